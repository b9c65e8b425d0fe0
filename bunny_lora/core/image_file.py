"""Drawn images on disk: what made an image is inside it, and decides whether it is still current."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bunny_lora.core import files
from bunny_lora.errors import BunnyLoraError

# Facts that do not change the pixels.
NOT_COMPARED = {"seconds"}


class ImageSettings(BaseModel):
    """What an image is drawn with, nothing left open; read it with `image_settings`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: str
    seed: int = Field(ge=0, lt=2**64)
    num_inference_steps: int = Field(ge=1, le=1000)
    guidance_scale: float = Field(ge=0)
    negative_prompt: str | None = None
    width: int = Field(ge=8, multiple_of=8)
    height: int = Field(ge=8, multiple_of=8)
    lora_scale: float = 1.0
    sampler: str
    path: Literal["fast", "reference"] = "fast"
    """fast: LoRA merged into the weights; reference: as diffusers alone draws, to the bit."""
    decoder: str | None = Field(None, exclude_if=lambda name: name is None)
    """A preview decoder in the place of the model's own."""

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _is_text(cls, text: str | None) -> str | None:
        """A command line may hold bytes that are no text."""
        return text if text is None else text.encode("utf-8", "replace").decode()


def image_settings(**settings: Any) -> ImageSettings:
    """Return the settings of an image that can be drawn.

    Raises:
        BunnyLoraError: one of them is missing, unknown or out of range; all are named.
    """
    try:
        return ImageSettings(**settings)
    except ValidationError as error:
        wrong = [f"{e['loc'][0]} {e['input']}: {e['msg']}" for e in error.errors(include_url=False)]
        raise BunnyLoraError(f"This image cannot be drawn: {'; '.join(wrong)}.") from None


def add_metadata(image: Image.Image, metadata: Mapping[str, Any]) -> Image.Image:
    """Have an image tell more of what made it; returns the image."""
    known = json.loads(image.info.get("parameters", "{}"))
    image.info["parameters"] = json.dumps(known | dict(metadata), ensure_ascii=False)
    return image


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically, with the image's metadata in its `parameters` text.

    Raises:
        BunnyLoraError: there is a folder of that name, or the file cannot be written.
    """
    if path.is_dir():
        raise BunnyLoraError(f"{path} is a folder, and no image takes its place: choose another name.")
    metadata = PngInfo()
    if "parameters" in image.info:
        text = image.info["parameters"].encode("utf-8", "replace").decode()
        metadata.add_itxt("parameters", text)
    with files.atomic_path(path) as part:
        image.save(part, format="PNG", pnginfo=metadata)


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Return the metadata that `save_image` put into a PNG; None of any other or a damaged file."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # The text may follow the pixels.
            metadata = json.loads(image.info["parameters"])
    except Exception:  # Pillow's decoders raise whatever they trip over.
        return None
    return metadata if isinstance(metadata, dict) else None


def is_current(path: Path, settings: ImageSettings, made_by: Mapping[str, Any]) -> bool:
    """Whether the image at `path` says that exactly these settings and weights drew it.

    Args:
        path: a PNG of `save_image`, or nothing yet.
        settings: of the image that is wanted.
        made_by: what else its pixels depend on: base model and adapters, by their bytes.
    """
    metadata = read_metadata(path)
    wanted = json.loads(json.dumps(settings.model_dump() | dict(made_by)))
    return metadata is not None and wanted == {
        key: value for key, value in metadata.items() if key not in NOT_COMPARED
    }
