"""The two axes: perfect renders sit at 1, the base model at 0, spoiled ones in between, in order."""

import itertools
from pathlib import Path

import pytest
import torch
from test_figures import assert_readable
from test_scores import make_result
from torch.nn.functional import one_hot

from bunny_lora import report
from bunny_lora.config import load_config
from bunny_lora.core import eval_result
from bunny_lora.core.seeding import generator
from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation import traits as axes
from bunny_lora.evaluation import world_traits
from bunny_lora.evaluation.protocol import NEUTRAL
from bunny_lora.evaluation.traits import Traits
from bunny_lora.evaluation.world_traits import Group
from bunny_lora.report.trait_scores import place

QUESTIONS = {
    "fur": ("white", "lilac", "crimson"),
    "outfit": ("none", "bow", "hat"),
    "mark": ("none", "heart", "bolt"),
    "eyes": ("green", "amber"),
    "place": ("forest", "beach"),
    "light": ("day", "sunset"),
    "pose": ("standing", "sitting"),
}
HEROES = {
    "ellie": {"fur": "lilac", "outfit": "bow", "mark": "heart", "eyes": "green"},
    "rex": {"fur": "crimson", "outfit": "hat", "mark": "bolt", "eyes": "amber"},
}
COUNTED = ("fur", "outfit", "mark", "eyes")
PROMPTS = ("{}, sitting, on the beach, at sunset", "{}, standing in the forest", "{}, sitting, day")


@pytest.fixture
def right() -> Traits:
    return Traits(QUESTIONS, HEROES, (*COUNTED, *axes.ASKED))


def read(rows: list[dict[str, str]], sure: float = 1.0) -> dict[str, torch.Tensor]:
    """What a reader would say that sees `rows`, and the first answer of what they leave open."""
    found = {}
    for question, answers in QUESTIONS.items():
        index = torch.tensor([answers.index(row.get(question, answers[0])) for row in rows])
        found[question] = sure * one_hot(index, len(answers)).float() + (1 - sure) / len(answers)
    return found


def group(looks: dict[str, dict[str, str]], nobody: dict[str, str] | None = None) -> Group:
    """Four images of each prompt, all as it asks, of characters that look as said."""
    cells = [(name, prompt) for name, prompt in itertools.product(looks, PROMPTS) for _ in range(4)]
    rows = [looks[name] | axes.asked_for(prompt, QUESTIONS) for name, prompt in cells]
    if nobody is not None:
        cells += [(NEUTRAL, prompt) for prompt in PROMPTS]
        rows += [nobody] * len(PROMPTS)
    prompts = [prompt.format(name) for name, prompt in cells]
    return Group([name for name, _ in cells], prompts, read(rows))


def test_renders_are_1_the_base_is_0_and_half_is_half(right: Traits) -> None:
    base = group({name: {} | {"eyes": "amber" if name == "ellie" else "green"} for name in HEROES}, {})
    half = {name: {trait: HEROES[name][trait] for trait in ("fur", "outfit")} for name in HEROES}
    half["ellie"] |= {"eyes": "amber"}
    groups = {"base": base, "checkpoint-1": group(half, {}), "final": group(HEROES, {"fur": "lilac"})}
    found = world_traits.summarise(right, groups, group(HEROES))
    means = {model: {name: v.mean for name, v in of.items()} for model, of in found.identity.items()}
    assert means["base"] == {"all": 0, "ellie": 0, "rex": 0}
    assert means["checkpoint-1"] == {"all": 0.5, "ellie": 0.5, "rex": 0.5}
    assert means["final"] == {"all": 1, "ellie": 1, "rex": 1}
    assert {source: value.mean for source, value in found.asked.items()} == dict.fromkeys(
        ("base", "checkpoint-1", "final", "ceiling"), 1
    )
    assert found.nobody["base"].mean == 0 and found.nobody["final"].mean == 1
    assert found.traits["rex"]["mark"].models == {"base": 0, "checkpoint-1": 0, "final": 1}
    assert found.confusion == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]


def test_where_prompts_tell_looks_the_floor_is_nobody_and_words_have_a_place(right: Traits) -> None:
    words = {name: {trait: HEROES[name][trait] for trait in ("fur", "outfit")} for name in HEROES}
    base = group(words, {})
    prompts = {"evaluation": {"prompts": ["{name}, {looks}"], "traits": dict(HEROES)}}
    told = load_config(overrides={"looks": {"rex": "a fox"}} | prompts)
    floor = world_traits._nobody(told, base)
    assert floor.characters == [name for name in HEROES for _ in PROMPTS]
    assert world_traits._nobody(load_config(), base) is None
    groups = {"base": base, "final": group(HEROES, {})}
    found = world_traits.summarise(right, groups, group(HEROES), floor)
    assert found.identity["final"]["all"].mean == 1
    assert found.identity["base"]["rex"].mean == 0.5, "fur and outfit of four traits"
    assert found.traits["rex"]["fur"].floor == 0 and found.traits["rex"]["fur"].models["base"] == 1
    assert place(found.traits["rex"]["fur"]) == 1
    assert world_traits.summarise(right, groups, group(HEROES)).traits["rex"]["fur"].floor is None


def test_a_heros_outfit_on_another_one_is_seen(right: Traits) -> None:
    looks = {"ellie": HEROES["ellie"] | {"outfit": "hat"}, "rex": HEROES["rex"]}
    found = world_traits.summarise(
        right, {"base": group({n: {} for n in HEROES}), "final": group(looks)}, group(HEROES)
    )
    assert found.another["final"].mean == 0.5
    assert found.another["base"].mean == found.another["ceiling"].mean == 0


def test_a_model_that_draws_heroes_everywhere_gains_on_one_axis_and_loses_on_the_other(
    right: Traits,
) -> None:
    drawn = group(HEROES)
    drawn.read["pose"][:] = drawn.read["place"][:] = torch.tensor([1.0, 0.0])
    found = world_traits.summarise(
        right, {"base": group({n: {} for n in HEROES}), "final": drawn}, group(HEROES)
    )
    assert found.identity["final"]["all"].mean == 1
    assert found.asked["final"].mean == pytest.approx((1 / 3 + 1 + 1 / 2) / 3, abs=1e-4)
    assert found.asked["base"].mean == 1


@pytest.mark.parametrize("name", HEROES)
def test_images_with_more_traits_spoiled_score_lower_one_by_one(right: Traits, name: str) -> None:
    others = {t: next(a for a in QUESTIONS[t] if a != HEROES[name][t]) for t in COUNTED}
    rows = [
        HEROES[name] | {trait: others[trait] for trait in spoiled}
        for n in range(len(COUNTED) + 1)
        for spoiled in itertools.combinations(COUNTED, n)
    ]
    scores = torch.stack(list(right.scores(read(rows, 0.9), name).values())).mean(0)
    n_spoiled = torch.tensor([sum(row[t] != HEROES[name][t] for t in COUNTED) for row in rows])
    for n in range(len(COUNTED)):
        assert scores[n_spoiled == n].min() > scores[n_spoiled == n + 1].max()


def test_prompts_ask_by_words() -> None:
    asked = axes.asked_for("ellie, animated character, sitting, on the beach, at sunset", QUESTIONS)
    assert asked == {"pose": "sitting", "place": "beach", "light": "sunset"}
    assert axes.asked_for("ellie", QUESTIONS) == {}
    assert axes.asked_for("sitting or standing", QUESTIONS) == {}, "either would do"
    assert axes.as_asked(read([{}]), ["ellie"], QUESTIONS).isnan().all()


def test_what_no_reader_reads_is_explained() -> None:
    with pytest.raises(BunnyLoraError, match=r"ellie names 'furr', .* Did you mean fur\?"):
        Traits(QUESTIONS, {"ellie": {"furr": "lilac"}}, COUNTED)
    with pytest.raises(BunnyLoraError, match=r"ellie\.fur: 'lilak' is no answer: .* lilac, crimson"):
        Traits(QUESTIONS, {"ellie": {"fur": "lilak"}}, COUNTED)


def test_intervals_of_alike_images_are_wider_and_hold_the_truth_as_often_as_they_say() -> None:
    rng, inside = generator(0, "test of intervals"), 0
    for trial in range(200):
        of_prompt = torch.randn(12, generator=rng)
        values = (of_prompt[:, None] + 0.1 * torch.randn((12, 4), generator=rng)).flatten()
        clusters = [prompt for prompt in range(12) for _ in range(4)]
        found = axes.clustered_interval(values, clusters, seed=trial)
        inside += found.low <= 0 <= found.high
        if trial == 0:
            alone = axes.clustered_interval(values, list(range(48)))
            assert found.high - found.low > 1.5 * (alone.high - alone.low)
    assert 0.85 < inside / 200 <= 1


def test_table_and_chart_show_both_axes_and_what_counts(right: Traits) -> None:
    base, drawn = group({name: {} for name in HEROES}, {}), group(HEROES, {"fur": "lilac"})
    found = world_traits.summarise(right, {"base": base, "final": drawn}, group(HEROES))
    result = make_result(list(HEROES)).model_copy(update={"traits": found})
    table = report.traits_table(result)
    assert "identity                   1.000" in table and "as asked                   1.000" in table
    assert "enough to count: fur, outfit, mark, eyes" in table
    figure = report.traits_chart(result)
    assert any(text.get_text() == "Identity 1.000, as asked 1.000" for text in figure.texts)
    nothing = report.traits_table(make_result(list(HEROES)))
    assert "No traits were read" in nothing


def test_the_sheet_ticks_what_is_right_below_each_image(right: Traits, tmp_path: Path) -> None:
    base, drawn = group({name: {} for name in HEROES}, {}), group(HEROES, {"fur": "lilac"})
    assert right.answers(drawn.read)[0]["fur"] == "lilac"
    found = world_traits.summarise(right, {"base": base, "final": drawn}, group(HEROES))
    result = make_result(list(HEROES))
    for image in result.images:
        image.read = HEROES[image.character] | ({"mark": "bolt"} if image.character == "ellie" else {})
    eval_result.write(tmp_path, result.model_copy(update={"traits": found}))
    figure = report.trait_sheet(tmp_path)
    texts = [text.get_text() for text in figure.texts]
    assert texts.count("\u2717 heart: bolt") == 2 == texts.count("\u2713 bolt")
    assert_readable(figure)
    eval_result.write(tmp_path, result)
    assert "No traits" in report.trait_sheet(tmp_path).texts[0].get_text()
