"""The class images of prior preservation: the user's own, and what is missing drawn by the base model.

A picture of ours carries what drew it in a text of its PNG. Anything else in the folder is the user's:
used as it is, never written over.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bunny_lora.config import Config
from bunny_lora.core import files, paths
from bunny_lora.core.progress import progress
from bunny_lora.core.seeding import derive_seed
from bunny_lora.data.frames import Sample
from bunny_lora.data.images import SUFFIXES, inspect
from bunny_lora.data.metadata import METADATA, json_lines
from bunny_lora.errors import BunnyLoraError, LeftOutError
from bunny_lora.model import components
from bunny_lora.training import validation
from bunny_lora.training.validation import ValidationImage

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

TEXT = "class_image"  # of a PNG: what drew it, and the hash of its pixels
BASE = ("base_model", "base_sha256", "precision")


@dataclass(frozen=True)
class Drawn:
    """One picture of ours: what is to draw it, and what drew the one that lies there, if any."""

    path: Path
    settings: dict[str, Any]
    before: dict[str, Any] | None

    @property
    def changes(self) -> list[str]:
        """What makes the one that lies there stale."""
        if self.before is None:
            return []
        return _changes(self.before, self.settings)


@dataclass(frozen=True)
class ClassImages:
    """What a run uses: the user's own pictures first, then ours, each in the order of their names."""

    own: list[Sample]
    drawn: list[Drawn]

    @property
    def samples(self) -> list[Sample]:
        """All of them as training reads them, once ours are drawn."""
        ours = [Sample(i.path.stem, i.path, str(i.settings["class_prompt"])) for i in self.drawn]
        return self.own + ours

    def sha256(self) -> str:
        """Return one hash of the user's files and captions, and of what ours are drawn from.

        The base model's weights have a hash of their own, and ours may differ in their last bits.
        """
        own = [[sample.caption, files.sha256(sample.path)] for sample in self.own]
        ours = [[(key, v) for key, v in i.settings.items() if key not in BASE] for i in self.drawn]
        return hashlib.sha256(json.dumps([own, ours]).encode()).hexdigest()


def plan(pipe: StableDiffusionPipeline, config: Config, base_sha256: str) -> ClassImages:
    """Return what a run uses; nothing is drawn yet.

    Raises:
        BunnyLoraError: a line of the folder's `metadata.jsonl` is broken.
    """
    prior = config.prior_preservation
    folder = paths.resolve(prior.class_data_dir)
    pictures = _pictures(folder)
    ours = {path: metadata for path in pictures if (metadata := _drawn_by(path)) is not None}
    own = _own_samples(folder, [path for path in pictures if path not in ours], config)
    settings = _settings(pipe, config, base_sha256)
    places = ((i, folder / f"class_{i:05d}.png") for i in itertools.count())
    free = (
        Drawn(path, settings | {"number": i}, ours.get(path))
        for i, path in places
        if path in ours or not path.exists()
    )
    return ClassImages(own, list(itertools.islice(free, prior.num_class_images - len(own))))


def generate_missing(pipe: StableDiffusionPipeline, config: Config, images: ClassImages) -> None:
    """Draw what is missing or stale with the base model; say what is drawn anew, and why."""
    changes = {line: None for image in images.drawn for line in image.changes}
    stale = [image for image in images.drawn if image.changes]
    wanted = [image for image in images.drawn if image.before is None or image.changes]
    if stale:
        place = paths.relative(stale[0].path.parent)
        print(f"Class images: {len(stale)} in {place} are drawn anew ({'; '.join(changes)})")
    for image in progress(wanted, desc="draw class images", disable=not wanted):
        seed = derive_seed(config.training.seed, "class image", image.settings["number"])
        sample = ValidationImage(image.path, config.prior_preservation.class_prompt, seed)
        _save(validation.generate(pipe, config, sample), image)


# ---------------------------------------------------------------------------- the user's own


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.glob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and files.is_file(path)
    )


def _own_samples(folder: Path, pictures: list[Path], config: Config) -> list[Sample]:
    """Return the user's pictures with their own captions, as many as are wanted."""
    prior = config.prior_preservation
    captions = _captions(folder / METADATA)
    whole = itertools.islice(_whole(pictures), prior.num_class_images)
    own = [Sample(path.stem, path, captions.get(path.name) or prior.class_prompt) for path in whole]
    if own:
        n_captions = sum(bool(captions.get(sample.path.name)) for sample in own)
        unused = f", of {len(pictures)}" if len(pictures) > len(own) else ""
        print(
            f"Class images: {len(own)}{unused} in {paths.relative(folder)} tell of nothing that drew"
            f" them, and are used as they are, as your own: {n_captions} with a caption of {METADATA},"
            " the others with the class_prompt"
        )
    return own


def _whole(pictures: list[Path]) -> Iterator[Path]:
    for path in pictures:
        try:
            inspect(path)
        except LeftOutError as error:
            print(f"Class images: left out, {error}")
        else:
            yield path


def _captions(path: Path) -> dict[str, str]:
    """Return file names to captions; pictures that are no longer there do no harm here."""
    rows = json_lines(path) if files.is_file(path) else iter(())
    captions = {}
    for number, row in rows:
        row = row if isinstance(row, dict) else {}
        name, text = row.get("file_name"), row.get("text") or ""
        if not isinstance(name, str) or not isinstance(text, str):
            raise BunnyLoraError(
                f'{path}, line {number}: should read {{"file_name": "a.jpg", "text": "a caption"}}.'
                " Mend the line, or remove the file: the class_prompt is the caption then."
            )
        captions[name] = text
    return captions


# ---------------------------------------------------------------------------- ours


def _settings(pipe: StableDiffusionPipeline, config: Config, base_sha256: str) -> dict[str, Any]:
    return {
        "class_prompt": config.prior_preservation.class_prompt,
        "resolution": config.resolution,
        "seed": config.training.seed,
        "num_inference_steps": config.sampling.num_inference_steps,
        "guidance_scale": config.sampling.guidance_scale,
        "sampler": components.sampler_name(config.base_model, config.sampling.sampler),
        "base_model": config.base_model,
        "base_sha256": base_sha256,
        "precision": str(pipe.unet.dtype).removeprefix("torch."),
    }


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return one line for each setting that differs.

    In another precision the same weights have another hash, and their name speaks for them.
    """
    base = "base_sha256" if before.get("precision") == now["precision"] else "base_model"
    lines = [
        f"{key}: {before.get(key)} before, {value} now"
        for key, value in now.items()
        if key not in BASE and before.get(key) != value
    ]
    if before.get(base) != now[base]:
        same_name = before.get("base_model") == now["base_model"]
        other = f"base_model: {before.get('base_model')} before, {now['base_model']} now"
        lines.append("base_model: other weights of that name now" if same_name else other)
    return lines


def _save(image: Image.Image, drawn: Drawn) -> None:
    metadata = drawn.settings | {"pixels_sha256": hashlib.sha256(image.tobytes()).hexdigest()}
    text = PngInfo()
    text.add_itxt(TEXT, json.dumps(metadata, ensure_ascii=False))
    with files.atomic_path(drawn.path) as part:
        image.save(part, format="PNG", pnginfo=text)


def _drawn_by(path: Path) -> dict[str, Any] | None:
    """Return what drew a picture of ours; None of any other, or if somebody has changed it since."""
    if not re.fullmatch(r"class_\d{5,}\.png", path.name):
        return None
    try:
        with Image.open(path, formats=["PNG"]) as image:
            pixels = hashlib.sha256(image.tobytes()).hexdigest()
            metadata = json.loads(image.info[TEXT])
            return metadata if metadata["pixels_sha256"] == pixels else None
    except Exception:  # Pillow's decoders raise whatever they trip over.
        return None
