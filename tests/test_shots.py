"""Which frames are of one shot, and what is held out of training."""

from collections import Counter
from pathlib import Path

import pytest
from conftest import draw_frames, tiny_config
from PIL import Image, ImageDraw

from bunny_lora.config import Config
from bunny_lora.data.frames import Sample
from bunny_lora.data.shots import near_duplicates, shots, split
from bunny_lora.dataset import read_samples
from bunny_lora.prepare import read_split, reading
from bunny_lora.trainer import LoRATrainer


def film(folder: Path, cast: list[tuple[str, ...]], length: int = 3) -> list[Sample]:
    """`length` frames of each shot, in which a ball moves a little; who is in the shot is named."""
    folder.mkdir(parents=True)
    samples = []
    for shot, names in enumerate(cast):
        for t in range(length):
            image = Image.new("RGB", (96, 54), (255 * (shot % 2), 40 * shot % 256, 130))
            ImageDraw.Draw(image).ellipse([30 + t, 20, 50 + t, 40], fill=(20, 200, 90 * (shot % 3)))
            image.save(path := folder / f"{shot:02d}_{t}.png")
            samples.append(Sample(path.stem, path, "a caption", names))
    return samples


def test_neighbours_and_returns_are_one_shot(tmp_path: Path) -> None:
    samples = film(tmp_path / "film", [("rex",)] * 4, length=2)
    paths = [sample.path for sample in samples]
    assert shots(paths) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert shots([*paths, paths[0]]) == [0, 0, 1, 1, 2, 2, 3, 3, 0]
    assert shots(paths[:1]) == [0]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_whole_shots_are_held_out_of_everybody_who_has_some(tmp_path: Path, share: float) -> None:
    cast = [("rex",), ("ellie", "rex"), ("ellie",), ("phil",), ("ellie",), ("rex",), ("ellie",)]
    samples = film(tmp_path / "film", cast)
    kept, held = split(samples, share)
    assert (kept, held) == split(samples, share)
    assert sorted([*kept, *held], key=lambda sample: sample.frame_id) == samples
    assert not {s.frame_id[:2] for s in kept} & {s.frame_id[:2] for s in held}
    given, total = (Counter(n for s in part for n in s.characters) for part in (held, samples))
    assert given["rex"] and given["ellie"] and not given["phil"]  # whose only shot it is
    for name in ("rex", "ellie"):
        assert given[name] <= max(3, share * total[name] + 1)


def test_nothing_is_held_out_unless_asked_for(tmp_path: Path) -> None:
    samples = film(tmp_path / "film", [("rex",)] * 4)
    assert split(samples, 0) == (samples, [])


def held_config(tiny_model: str, **changes: object) -> Config:
    return tiny_config(tiny_model, held_out=0.25, training={"max_train_steps": 1}, **changes)


def test_training_does_not_see_what_is_held_out_and_says_so(
    project: Path, tiny_model: str, capsys: pytest.CaptureFixture
) -> None:
    draw_frames(project / "data" / "instance_images", 5)
    config = held_config(tiny_model)
    kept, held = read_split(config)
    assert [*kept, *held] != read_samples(config.data_path, **reading(config)) and held
    trainer = LoRATrainer(config=config)
    trainer.load()
    seen = [sample.path for sample in trainer.setup.learner.images.samples]
    assert seen == [sample.path for sample in kept]
    said = f"held_out: {len(held)} of 5 images, in whole shots, are not learnt from"
    assert said in capsys.readouterr().out


def test_neighbours_in_which_nothing_much_moves_are_near_duplicates(tmp_path: Path) -> None:
    """What moves little from each to the next has moved far in the end: compared with the first."""
    places = [0, 1, 2, 10, 40, 40]
    paths = []
    for number, left in enumerate(places):
        image = Image.new("RGB", (96, 54))
        image.paste("white", (left, 20, left + 12, 32))
        image.save(path := tmp_path / f"{number}.png")
        paths.append(path)
    assert near_duplicates(paths) == [0, 1, 2, 3, 4, 4]
    assert near_duplicates([*paths[:1], *paths[:1], paths[5], paths[0]]) == [0, 0, 2, 3]
    assert near_duplicates([]) == []
