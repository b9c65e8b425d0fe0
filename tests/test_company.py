"""Two characters in one image: who is there, and that one drawn twice is not both."""

import json
from pathlib import Path

import pytest
import torch
from conftest import draw_frames, tiny_config
from PIL import Image
from test_scores import make_result

from bunny_lora import report
from bunny_lora.config import Config, validate
from bunny_lora.core.eval_parts import Interval, PairImage, Pairs
from bunny_lora.core.eval_result import Anchors, IdentityScores
from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation import company, cutouts, evaluate
from bunny_lora.evaluation.features import load_feature_extractor
from bunny_lora.trainer import LoRATrainer
from bunny_lora.world.attributes import HEROES, hero_picture
from bunny_lora.world.renderer import render

SIDE = 128


def span(mean: float) -> Interval:
    return Interval(mean=mean, low=None, high=None, n=4)


def test_windows_that_are_apart_do_not_overlap_sideways() -> None:
    boxes = cutouts.window_boxes(SIDE)
    assert len(boxes) == len(cutouts.windows(Image.new("RGB", (SIDE, SIDE))))
    places = cutouts.apart()
    assert places and {(j, i) for i, j in places} == set(places)
    for i, j in places:
        (left, right) = sorted((boxes[i], boxes[j]))
        assert left[2] <= right[0]


def test_one_character_drawn_twice_is_not_both() -> None:
    n = len(cutouts.window_boxes(SIDE))
    i, j = cutouts.apart()[0]
    first, second = torch.zeros(n), torch.zeros(n)
    first[i] = first[j] = 1.0
    assert company.most_like_both(first, second) == (1.0, 0.0)
    second[j] = 0.9
    assert company.most_like_both(first, second) == pytest.approx((1.0, 0.9))
    second[j], second[i] = 0.0, 0.9  # the other way round is as good
    assert company.most_like_both(first, second) == pytest.approx((1.0, 0.9))
    mixed = torch.zeros(n)
    mixed[i] = 1.0  # one animal with something of both
    assert sorted(company.most_like_both(mixed, mixed)) == [0.0, 1.0]


def cut(name: str, index: int) -> Image.Image:
    """A hero as references show one."""
    drawn = render(hero_picture([name], 7, index, camera="medium"), (256, 256))
    return cutouts.crop_around(drawn.image, drawn.faces[0], cutouts.FACE_TO_BODY)


def test_heroes_side_by_side_are_both_there_and_a_stranger_is_not(tmp_path: Path) -> None:
    extractor = load_feature_extractor("bunny-world", "cpu")
    names = ["ellie", "rex"]
    references = {name: extractor([cut(name, i) for i in range(8)]) for name in names}
    own = {name: extractor([cut(name, i) for i in range(8, 12)]) for name in HEROES}

    def like(other: str, name: str) -> Interval:
        return span(float((own[other] @ references[name].mean(0)).mean()))

    anchors = {
        name: Anchors(
            base=max((like(o, name) for o in HEROES if o != name), key=lambda found: found.mean),
            wrong=None,
            ceiling=like(name, name),
        )
        for name in names
    }
    identity = IdentityScores(features="bunny-world", anchors=anchors, blind={}, models={}, change=None)
    config = validate({"evaluation": {"pair_prompts": ["{first} and {second}"]}})
    planned = [spec for spec in company.plan_pairs(config, names) if spec.image.model == "final"]
    folder = tmp_path / "evaluation"

    def there(*heroes: str) -> int:
        sides = [render(hero_picture([h], 7, 40, camera="wide"), (SIDE, SIDE)) for h in heroes]
        image = Image.new("RGB", (2 * SIDE, 2 * SIDE), "white")
        for place, side in enumerate(sides):
            square = cutouts.crop_around(side.image, side.faces[0], cutouts.FACE_TO_BODY)
            image.paste(square.resize((SIDE, SIDE)), (place * SIDE, SIDE // 2))
        for spec in planned:
            path = folder / spec.image.file
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        found = company.pair_scores(tmp_path, planned, references, extractor, identity)
        assert found is not None and {i.n_there for i in found.images} == {found.images[0].n_there}
        return found.images[0].n_there

    assert set(names) < set(HEROES)
    assert there("ellie", "rex") == there("rex", "ellie") == 2
    assert there("ellie", "ellie") == 1
    assert there("phil", "victoria") == 0


def test_a_run_says_how_often_both_are_there(project: Path, tiny_model: str) -> None:
    frames = project / "data" / "instance_images"
    draw_frames(frames, 8)
    lines = [json.loads(line) for line in (frames / "metadata.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["text"] = f"{('ellie', 'rex')[number % 2]}, waving, place {number}"
    (frames / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = tiny_config(
        tiny_model,
        character_names=["ellie", "rex"],
        training={"max_train_steps": 1},
        evaluation={
            "prompts": ["{name}, waving"],
            "pair_prompts": ["{first} and {second}, waving"],
            "num_images_per_prompt": 1,
        },
    )
    run_dir = LoRATrainer(config=config).train().parent
    result = evaluate(run_dir, config=config)
    assert result.settings.pair_prompts == ["{first} and {second}, waving"]
    drawn = list((run_dir / "evaluation" / "images").rglob("ellie_and_rex*.png"))
    assert len(drawn) == 2 and "ellie and rex" not in result.models["final"].characters
    judged = result.identity is not None and not result.identity.blind
    assert (result.pairs is not None) == judged


def test_the_table_says_how_often_both_are_there_and_which_two_are_least() -> None:
    result = make_result(["rex", "ellie", "phil"])
    images = [
        PairImage(
            model=model,
            names=[first, second],
            prompt=f"{first} and {second}",
            file="x.png",
            identity=[1.0, 0.0 if second == "phil" else 0.6],
        )
        for model in ("base", "final")
        for first, second in (("rex", "ellie"), ("rex", "phil"))
    ]
    result.identity = IdentityScores(features="palette", anchors={}, blind={}, models={}, change=None)
    result.pairs = Pairs(both=company._shares(images, 2), one=company._shares(images, 1), images=images)
    table = report.axes_table(result)
    assert "both are there         0.500   0.500" in table
    assert "least often both: rex and phil, in 0 of 1 images" in table


def test_prompts_of_two_name_two() -> None:
    assert Config().evaluation.pair_prompts == []
    with pytest.raises(BunnyLoraError, match=r"takes prompts with .first. and .second."):
        validate({"evaluation": {"pair_prompts": ["{name} alone"]}})
