"""Prior preservation's class images: whose they are, what drew them, and what is drawn anew."""

import json
from pathlib import Path

import pytest
from conftest import draw_frames, tiny_config
from PIL import Image

from bunny_lora.core.files import read_json, write_json
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import random_models
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training import checkpoint

PRIOR = {"enabled": True, "num_class_images": 2, "class_prompt": "bunny", "class_data_dir": "class"}


@pytest.fixture
def folder(project: Path) -> Path:
    draw_frames(project / "data" / "instance_images", 2)
    (project / "class").mkdir()
    return project / "class"


def load(tiny_model: str, prior: dict | None = None, **overrides: object) -> LoRATrainer:
    config = tiny_config(tiny_model, prior_preservation=PRIOR | (prior or {}), **overrides)
    trainer = LoRATrainer(config=config)
    trainer.load()
    return trainer


def captions(trainer: LoRATrainer) -> dict[str, str]:
    return {sample.path.name: sample.caption for sample in trainer.setup.learner.class_images.samples}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def own_picture(path: Path, colour: str = "red") -> None:
    Image.new("RGB", (40, 40), colour).save(path)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"prior": {"class_prompt": "rabbit"}}, "class_prompt: bunny before, rabbit now"),
        ({"resolution": 64}, "resolution: 32 before, 64 now"),
        ({"sampling": {"num_inference_steps": 3}}, "num_inference_steps: 2 before, 3 now"),
        ({"sampling": {"guidance_scale": 2.0}}, "guidance_scale: 7.5 before, 2.0 now"),
        ({"training": {"seed": 7}}, "seed: 42 before, 7 now"),
    ],
)
def test_what_other_settings_drew_is_drawn_anew_and_the_reason_said(
    tiny_model: str, folder: Path, change: dict, told: str, capsys: pytest.CaptureFixture
) -> None:
    load(tiny_model)
    before = contents(folder)
    capsys.readouterr()
    trainer = load(tiny_model, **change)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "Class images" in line]
    assert "2 in class are drawn anew" in line and told in line
    assert contents(folder).keys() == before.keys() == captions(trainer).keys()
    assert all(contents(folder)[name] != before[name] for name in before)
    assert set(captions(trainer).values()) == {change.get("prior", PRIOR)["class_prompt"]}


def test_what_another_base_model_drew_is_drawn_anew(
    tiny_model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    load(tiny_model)
    before = contents(folder)
    random_models.build_pipeline(random_models.TINY, seed=1).save_pretrained(tmp_path / "other")
    load(str(tmp_path / "other"))
    assert "base_model: " in capsys.readouterr().out
    assert all(contents(folder)[name] != before[name] for name in before)


def test_what_the_same_settings_drew_stays_without_a_word(
    tiny_model: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    load(tiny_model)
    before = contents(folder)
    capsys.readouterr()
    load(tiny_model, {"prior_loss_weight": 0.5}, training={"max_train_steps": 9})
    assert contents(folder) == before
    assert "Class images" not in capsys.readouterr().out


def test_in_another_precision_ours_are_not_drawn_anew(tiny_model: str, folder: Path) -> None:
    load(tiny_model)
    before = contents(folder)
    load(tiny_model, training={"mixed_precision": "bf16"})
    assert contents(folder) == before


def test_nothing_of_the_users_is_written_over_and_their_captions_are_used(
    tiny_model: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("mine.jpg", "class_00000.png"):
        own_picture(folder / name)
    rows = [{"file_name": "mine.jpg", "text": "a red wall"}, {"file_name": "gone.png", "text": "x"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = contents(folder)
    trainer = load(tiny_model, {"num_class_images": 3})
    expected = {"class_00000.png": "bunny", "mine.jpg": "a red wall", "class_00001.png": "bunny"}
    assert captions(trainer) == expected
    assert "2 in class tell of nothing that drew them" in capsys.readouterr().out
    again = load(tiny_model, {"num_class_images": 3, "class_prompt": "rabbit"})
    assert captions(again) == expected | {"class_00000.png": "rabbit", "class_00001.png": "rabbit"}
    assert before.items() <= contents(folder).items()
    assert contents(folder).keys() - before.keys() == {"class_00001.png"}


def test_a_picture_of_ours_that_the_user_has_changed_is_the_users(
    tiny_model: str, folder: Path
) -> None:
    load(tiny_model)
    with Image.open(folder / "class_00001.png") as image:
        image.load()
        image.putpixel((0, 0), (1, 2, 3))
        image.save(folder / "class_00001.png")
    changed = contents(folder)["class_00001.png"]
    trainer = load(tiny_model, {"class_prompt": "rabbit"})
    assert contents(folder)["class_00001.png"] == changed
    assert list(captions(trainer)) == ["class_00001.png", "class_00000.png"]


def train(tiny_model: str, steps: int = 2, **overrides: object) -> Path:
    training = {"max_train_steps": steps, "lr_scheduler": "constant"}
    config = tiny_config(tiny_model, prior_preservation=PRIOR, training=training, **overrides)
    return LoRATrainer(config=config).train()


def test_a_class_image_that_was_replaced_is_refused_like_other_training_data(
    tiny_model: str, folder: Path
) -> None:
    own_picture(folder / "mine.png")
    train(tiny_model)
    own_picture(folder / "mine.png", "blue")
    with pytest.raises(BunnyLoraError, match=r"checkpoint-2 was made with other class images"):
        train(tiny_model, steps=3)
    own_picture(folder / "mine.png", "red")
    train(tiny_model, steps=3)
    (folder / "metadata.jsonl").write_text('{"file_name": "mine.png", "text": "a wall"}\n')
    with pytest.raises(BunnyLoraError, match=r"checkpoint-3 was made with other class images"):
        train(tiny_model, steps=4)


def test_a_run_whose_class_images_would_be_drawn_otherwise_is_refused_before_any_is(
    tiny_model: str, folder: Path
) -> None:
    train(tiny_model)
    before = contents(folder)
    with pytest.raises(BunnyLoraError, match="sampling settings"):
        train(tiny_model, steps=3, sampling={"num_inference_steps": 3})
    assert contents(folder) == before


def test_class_images_that_were_removed_are_drawn_again_and_the_run_goes_on(
    tiny_model: str, folder: Path
) -> None:
    train(tiny_model)
    before = contents(folder)
    for path in folder.iterdir():
        path.unlink()
    train(tiny_model, steps=3)
    assert contents(folder) == before


def test_a_run_begun_before_class_images_were_recorded_goes_on(tiny_model: str, folder: Path) -> None:
    """Theirs were plain pictures, and a `metadata.jsonl` with the class prompt for each."""
    rows = []
    for i in range(2):
        own_picture(folder / f"class_{i:05d}.png")
        rows.append(json.dumps({"file_name": f"class_{i:05d}.png", "text": "bunny"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    before = contents(folder)
    folder_of_step = train(tiny_model).parent / "checkpoint-2"
    state = read_json(folder_of_step / checkpoint.STATE)
    assert state.pop("class_sha256")
    write_json(folder_of_step / checkpoint.STATE, state)
    (folder_of_step / checkpoint.SUMS).unlink()
    (folder_of_step / checkpoint.SUMS).write_text(checkpoint._sums(folder_of_step))
    train(tiny_model, steps=3)
    assert contents(folder) == before


def test_every_format_is_seen_and_what_is_no_picture_is_left_out(
    tiny_model: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    names = ["a.bmp", "b.gif", "c.jpeg", "d.jpg", "e.PNG", "f.tif", "g.tiff", "h.webp"]
    for name in names:
        own_picture(folder / name)
    (folder / "._0.jpg").write_bytes(b"\0\5\x16\7")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("mine")
    trainer = load(tiny_model, {"num_class_images": 8})
    assert list(captions(trainer)) == names
    assert "left out, broken image: broken.jpg" in capsys.readouterr().out


def test_a_broken_line_of_the_users_captions_is_named(tiny_model: str, folder: Path) -> None:
    own_picture(folder / "mine.jpg")
    (folder / "metadata.jsonl").write_text('{"file_name": 3}\n')
    with pytest.raises(BunnyLoraError, match=r"metadata\.jsonl, line 1"):
        load(tiny_model)
