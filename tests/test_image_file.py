"""Images on disk: what made one is inside it; it is current only if all of that is what is wanted."""

from pathlib import Path

import pytest
from PIL import Image

from bunny_lora.core import image_file
from bunny_lora.core.image_file import ImageSettings, image_settings
from bunny_lora.errors import BunnyLoraError

SETTINGS = {
    "prompt": "ellie",
    "seed": 1,
    "num_inference_steps": 2,
    "guidance_scale": 4.0,
    "width": 8,
    "height": 16,
    "sampler": "DDIMScheduler",
}
MADE_BY = {"base_sha256": "abc", "loras": [["def", 1.0]]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    image = Image.new("RGB", (8, 16))
    made = image_settings(**SETTINGS).model_dump() | MADE_BY | {"seconds": 1.5}
    image_file.save_image(image_file.add_metadata(image, made), tmp_path / "image.png")
    return tmp_path / "image.png"


def test_an_image_of_these_settings_and_weights_is_current(path: Path) -> None:
    assert image_file.is_current(path, image_settings(**SETTINGS), MADE_BY)


@pytest.mark.parametrize("name", ImageSettings.model_fields)
def test_an_image_that_differs_in_any_setting_is_stale(path: Path, name: str) -> None:
    value = getattr(image_settings(**SETTINGS), name)
    other = value + 8 if isinstance(value, int | float) else "other"
    other = "reference" if name == "path" else other
    assert not image_file.is_current(path, image_settings(**SETTINGS | {name: other}), MADE_BY)


def test_an_image_of_other_weights_or_of_more_than_is_asked_for_is_stale(path: Path) -> None:
    settings = image_settings(**SETTINGS)
    for made_by in (MADE_BY | {"base_sha256": "xyz"}, {"base_sha256": "abc"}, {}):
        assert not image_file.is_current(path, settings, made_by)
    assert not image_file.is_current(path.with_name("missing.png"), settings, MADE_BY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_inference_steps", 0),
        ("num_inference_steps", -3),
        ("num_inference_steps", 1001),
        ("guidance_scale", float("nan")),
        ("guidance_scale", -1),
        ("lora_scale", float("inf")),
        ("width", 12),
        ("height", 0),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_settings_that_cannot_be_drawn_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(BunnyLoraError, match=f"cannot be drawn: {name} "):
        image_settings(**SETTINGS | {name: value})


def test_no_image_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "keep.png").mkdir()
    (tmp_path / "keep.png" / "notes.txt").write_text("precious")
    with pytest.raises(BunnyLoraError, match="is a folder"):
        image_file.save_image(Image.new("RGB", (8, 8)), tmp_path / "keep.png")
    assert (tmp_path / "keep.png" / "notes.txt").read_text() == "precious"
