"""The shipped reader of traits, the judge of identity: how well it reads, and how it orders."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation import traits as axes
from bunny_lora.evaluation.world_traits import Group, summarise
from bunny_lora.model.components import WORLD_WEIGHTS
from bunny_lora.world import attributes
from bunny_lora.world.asked import render_as_asked
from bunny_lora.world.attributes import HEROES, Picture, Traits, fresh_heroes, hero_picture
from bunny_lora.world.renderer import render_array
from bunny_lora.world.traits import (
    QUESTIONS,
    RELIABLE,
    TRAITS,
    identity_scores,
    read_traits,
    reliable_questions,
    reliable_traits,
    traits_to_see,
    truth,
)

N_SPOILED, N_SCENES = 5, 4


def drawn(pictures: list[Picture]) -> torch.Tensor:
    rows = [render_array(picture).transpose(2, 0, 1) for picture in pictures]
    return torch.from_numpy(np.stack(rows))


def with_traits(picture: Picture, traits: Traits) -> Picture:
    return replace(picture, characters=(replace(picture.characters[0], traits=traits),))


def test_every_question_gets_a_probability_for_each_answer() -> None:
    images = torch.randint(256, (3, 3, 128, 128), dtype=torch.uint8)
    read = read_traits(images)
    assert read.keys() == QUESTIONS.keys() == TRAITS.keys() | {"place", "light", "pose"}
    for name, answers in QUESTIONS.items():
        assert read[name].shape == (3, len(answers)) and read[name].dtype == torch.float32
        torch.testing.assert_close(read[name].sum(1), torch.ones(3))
    larger = read_traits(images.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert larger["fur"].shape == read["fur"].shape


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(1, 3, 128, 128), "float32"),
        (torch.zeros(3, 128, 128, dtype=torch.uint8), r"\[3, 128, 128\]"),
        (torch.zeros(0, 3, 128, 128, dtype=torch.uint8), r"\[0, 3"),
        (torch.zeros(1, 3, 90, 160, dtype=torch.uint8), "160 x 90: cut"),
    ],
)
def test_other_images_are_refused_in_words(images: torch.Tensor, said: str) -> None:
    with pytest.raises(BunnyLoraError, match=said):
        read_traits(images)


def test_it_reads_heroes_that_it_never_saw() -> None:
    cast = HEROES | fresh_heroes(3)
    pictures = [
        hero_picture([name], 5, index, camera="medium", heroes=cast)
        for name in cast
        for index in range(3)
    ]
    read, hits = read_traits(drawn(pictures)), []
    for row, picture in enumerate(pictures):
        for name, answer in truth(picture).items():
            if name in reliable_traits():
                hits.append(QUESTIONS[name][int(read[name][row].argmax())] == answer)
    assert len(hits) > 24 and np.mean(hits) > 0.85


def spoiled(traits: Traits, n: int, counted: tuple[str, ...], rng: np.random.Generator) -> Traits:
    """Return `traits` with `n` of those that count changed; with its species a hero loses its ear."""
    changed: set[str] = set()
    for name in map(str, rng.permutation(counted)):
        together = {"species", "ear"} & set(counted) if name == "species" else {name}
        if name in changed or len(changed | together) > n:
            continue
        changed |= together
        traits = replace(traits, **{name: attributes.pick(rng, others(traits, name))})
        if name == "species":
            traits = replace(traits, ear="plain")
    assert len(changed) == n
    return traits


def others(traits: Traits, name: str) -> list[str]:
    """Return the other answers that can be seen and hide nothing."""
    if name == "ear":
        return ["plain"]
    hidden = {"fur": (traits.outfit_colour, traits.mark_colour)}.get(name, (traits.fur,))
    hidden += (getattr(traits, name), "none")
    kept = attributes.BARE_CHEST if name == "outfit" else TRAITS[name]
    return [answer for answer in kept if answer not in hidden]


def ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value, the mean one for ties."""
    return (values[:, None] > values).sum(1) + (values[:, None] == values).sum(1) / 2


@pytest.mark.parametrize("hero", HEROES)
def test_spoiled_pictures_are_put_in_order_one_by_one(hero: str) -> None:
    rng, counted = np.random.default_rng(0), reliable_traits()
    whole = traits_to_see(HEROES[hero])
    scenes = (hero_picture([hero], 11, index, camera="medium") for index in range(40))
    clear = [scene for scene in scenes if truth(scene).items() >= whole.items()][:N_SCENES]
    levels = [level for _ in clear for level in range(min(N_SPOILED, len(counted)) + 1)]
    pictures = [
        with_traits(scene, spoiled(HEROES[hero], level, counted, rng))
        for scene in clear
        for level in range(min(N_SPOILED, len(counted)) + 1)
    ]
    scores = identity_scores(read_traits(drawn(pictures)), whole, counted).numpy()
    assert len(clear) == N_SCENES
    assert np.corrcoef(ranks(scores), ranks(-np.array(levels)))[0, 1] >= 0.85


def clear_scenes(hero: str, n: int) -> list[Picture]:
    """Medium shots of a hero in which all of its traits can be seen."""
    whole = traits_to_see(HEROES[hero])
    scenes = (hero_picture([hero], 12, index, camera="medium") for index in range(60))
    return [scene for scene in scenes if truth(scene).items() >= whole.items()][:n]


@pytest.mark.parametrize("hero", HEROES)
def test_each_single_wrong_trait_costs_more_than_one_picture_differs_from_the_next(hero: str) -> None:
    rng, counted = np.random.default_rng(1), reliable_traits()
    whole, scenes = traits_to_see(HEROES[hero]), clear_scenes(hero, 6)
    right = identity_scores(read_traits(drawn(scenes)), whole, counted)
    for trait in counted:
        wrong = replace(HEROES[hero], **{trait: attributes.pick(rng, others(HEROES[hero], trait))})
        wrong = replace(wrong, ear="plain") if trait == "species" else wrong
        pictures = drawn([with_traits(scene, wrong) for scene in scenes])
        cost = right - identity_scores(read_traits(pictures), whole, counted)
        assert cost.mean() > right.std(), trait


def test_renders_of_the_heroes_stand_at_one_and_of_one_another_at_nothing() -> None:
    prompts = ["{}, sitting, on the beach, medium shot", "{}, waving, in the snow, medium shot"]
    right = axes.Traits(QUESTIONS, {n: asdict(t) for n, t in HEROES.items()}, reliable_questions())

    another = dict(zip(HEROES, [*list(HEROES)[1:], *HEROES], strict=False))

    def group(first: int, *, wrong: bool = False) -> Group:
        cells = [(name, prompt) for name in HEROES for prompt in prompts for _ in range(5)]
        images = [
            render_as_asked(
                asdict(HEROES[another[name] if wrong else name]),
                axes.asked_for(prompt, QUESTIONS),
                camera="medium",
                number=first + number,
                size_px=128,
            )
            for number, (name, prompt) in enumerate(cells)
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        return Group(
            [name for name, _ in cells],
            [prompt.format(name) for name, prompt in cells],
            read_traits(pixels.permute(0, 3, 1, 2)),
        )

    base = group(0, wrong=True)
    for first, wrong, stands in ((100, False, 1.0), (200, True, 0.0)):
        groups = {"base": base, "final": group(first, wrong=wrong)}
        found = summarise(right, groups, group(300))
        identity = found.identity["final"]["all"]
        assert identity.low is not None and identity.high is not None
        assert identity.mean == pytest.approx(stands, abs=0.05)
        assert identity.low - 0.01 <= stands <= identity.high + 0.01
        assert found.asked["final"].mean > 0.95


def test_what_cannot_be_seen_is_not_asked() -> None:
    ellie = HEROES["ellie"]
    assert set(traits_to_see(ellie)) == set(TRAITS)
    bare = replace(ellie, outfit="none", mark="none")
    for seen, hidden in (
        (traits_to_see(ellie, pose="sleeping"), {"eyes", "outfit", "outfit_colour"}),
        (traits_to_see(ellie, expression="laughing"), {"eyes"}),
        (traits_to_see(bare), {"outfit_colour", "mark_colour"}),
    ):
        assert set(TRAITS) - set(seen) == hidden


def test_a_score_is_the_mean_probability_of_the_right_answers() -> None:
    read = {name: torch.zeros(2, len(answers)) for name, answers in QUESTIONS.items()}
    read["species"][:, 0] = torch.tensor([1.0, 0.5])
    right = {"species": "bunny", "fur": "white"}
    assert identity_scores(read, right).tolist() == [0.5, 0.25]
    assert identity_scores(read, right, ("species",)).tolist() == [1.0, 0.5]


def test_only_what_is_read_well_counts() -> None:
    shares = json.loads((WORLD_WEIGHTS / "reader" / "accuracy.json").read_text(encoding="utf-8"))
    assert shares["n_images_per_camera"] >= 50
    for camera in attributes.CAMERAS:
        counted = reliable_traits(camera)
        assert counted == tuple(
            name for name in TRAITS if shares["reconstructions"][camera][name] >= RELIABLE
        )
    assert {"species", "fur"} <= set(reliable_traits())
