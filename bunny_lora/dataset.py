"""Training data on disk, read back as tensors, by position; `prepare` writes it.

The layout is the one that Hugging Face `datasets` calls `imagefolder`: pictures, and `metadata.jsonl`
beside them with one `{"file_name": …, "text": …}` a line. `data_summary.json` lies one folder above.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from bunny_lora.core import files, paths, seeding
from bunny_lora.core.values import Zoom
from bunny_lora.data.buckets import bucket_of
from bunny_lora.data.captions import MEDIUM, PORTRAIT, name_first, name_only, near_caption
from bunny_lora.data.folder import Listing, has_captions, read_folder
from bunny_lora.data.frames import FaceNames, Sample, Unused, unseen
from bunny_lora.data.images import (
    FACE_TO_MEDIUM,
    Finder,
    crop_around,
    open_rgb,
)
from bunny_lora.data.metadata import find_table, read_rows
from bunny_lora.data.summary import (
    caption_tokens,
    characters_of,
    load_summary,
    sample_from,
    sha256_hex,
)
from bunny_lora.data.writing import fitted, prepare
from bunny_lora.errors import BunnyLoraError

FACE_TO_PORTRAIT = 1.8  # where the picture ends before that: not much but a head

__all__ = [
    "ImageDataset",
    "Sample",
    "data_sha256",
    "load_summary",
    "name_first",
    "prepare",
    "read_samples",
    "sample_indices",
]


class ImageDataset(torch.utils.data.Dataset[torch.Tensor]):
    """Pictures of a prepared folder, in the order of its `metadata.jsonl`, cut to size.

    `samples[i]` says what is known of picture i, and `face_names[i]` whose its faces are, where they
    were tied to names, see `training.faces`. Item i is float32 [3, H, W] in [-1, 1]. With
    `center_crop`, H = W = `resolution`. Without it, the shorter side is `resolution` and the longer one
    the nearest multiple of 8, a latent pixel. With `aspect_buckets` they are as `bucket_of` says.
    """

    def __init__(
        self,
        data_dir: Path | Sequence[Sample],
        *,
        resolution: int,
        center_crop: bool,
        aspect_buckets: bool = False,
        instance_prompt: str = "",
        tokenizer: Any = None,
    ) -> None:
        """Read the captions; pictures are opened when they are asked for.

        Args:
            data_dir: a folder with `metadata.jsonl`, ours or anybody's; or samples that are known.
            resolution: in pixels, a multiple of 8.
            center_crop: cut the middle square, or keep the whole picture.
            aspect_buckets: keep the whole picture, but for the little by which its shape is another.
            instance_prompt: the caption of lines that have no `text`.
            tokenizer: as in `prepare`, for folders that were prepared without one, or by others.

        Raises:
            BunnyLoraError: `metadata.jsonl` is missing or broken (names the line), or a picture is
                missing.
        """
        self.resolution, self.aspect_buckets = resolution, aspect_buckets
        self.center_crop = center_crop and not aspect_buckets
        self.face_names: list[FaceNames] | None = None
        if isinstance(data_dir, Path):
            data_dir = read_samples(data_dir, instance_prompt)
        self.samples = list(data_dir)
        if tokenizer is not None:
            self.samples = [fitted(sample, tokenizer) for sample in self.samples]

    @property
    def names(self) -> frozenset[str]:
        """Everybody who is named as being in one of the pictures."""
        return frozenset(name for sample in self.samples for name in sample.characters)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._pixels(self._open(index, self._cut))

    def face(self, index: int, face: int, scale: float) -> Image.Image:
        """Return the square around a face of a picture, so many times as wide as its box."""
        box = self.samples[index].faces[face]
        return self._open(index, lambda image: crop_around(image, box, scale))

    def _open(self, index: int, cut: Callable[[Image.Image], Image.Image]) -> Image.Image:
        path = self.samples[index].path
        try:
            return cut(open_rgb(path))
        except Exception as error:  # Pillow's decoders raise whatever they trip over.
            raise BunnyLoraError(f"Could not read {path}: {error}. Prepare the data again.") from error

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32) / 127.5 - 1.0

    def repeats(
        self, *, balance: bool = True, zoom: Zoom = False, groups: Sequence[int] | None = None
    ) -> list[int]:
        """Return how often to show each picture; with `balance`, every character about as often.

        Who is in most pictures sets the measure; a picture counts for the rarest of those in it. Where
        faces were tied to names, a picture counts as far as a character is seen in its views.

        Args:
            balance: characters, or leave the pictures as they are.
            zoom: there are views from near; "only": and no others, where there are.
            groups: as `near_duplicates` returns them: who is in one shares the weight of one picture.
        """
        sizes = Counter(groups or range(len(self)))
        largest = max(sizes.values(), default=1)
        shared = [1 / sizes[group] for group in groups or range(len(self))]
        weights = [sample.repeats * part for sample, part in zip(self.samples, shared, strict=True)]
        if balance:
            factors = self._rarity(weights, zoom=zoom)
            weights = [weight * factor for weight, factor in zip(weights, factors, strict=True)]
        return [max(1, round(weight * largest)) for weight in weights]

    def _rarity(self, weights: list[float], *, zoom: Zoom) -> list[int]:
        """Return how many times rarer than the commonest character the rarest of each picture is."""
        counts: dict[str, float] = {}
        for index, weight in enumerate(weights):
            for name, share in self._seen(index, zoom=zoom).items():
                counts[name] = counts.get(name, 0) + weight * share
        most = max(counts.values(), default=1)
        seen = [self._seen(index, zoom=zoom) for index in range(len(self))]
        return [
            max((round(most / counts[name]) for name, share in names.items() if share), default=1)
            for names in seen
        ]

    def _seen(self, index: int, *, zoom: Zoom) -> dict[str, float]:
        """Return in what share of a picture's views each character is seen."""
        characters = self.samples[index].characters
        if self.face_names is None:
            return dict.fromkeys(characters, 1.0)
        cut_off = self._cut_off(index)
        whole = {name: float(name not in cut_off) for name in characters}
        faces = [self.face_names[index][face] for face in self.faces_to_zoom(index)]
        if not (zoom and faces):
            return whole
        near = {name: faces.count(name) / len(faces) for name in whole}
        if zoom == "only":
            return near
        return {name: (share + near[name]) / 2 for name, share in whole.items()}

    def faces_to_zoom(self, index: int) -> list[int]:
        """Return which faces of a picture are known by name, so that it is clear who would be seen."""
        if self.face_names is None:
            return [0] if self.samples[index].is_sure else []
        return [face for face, name in enumerate(self.face_names[index]) if name]

    def zoomed(self, index: int, face: int = 0) -> torch.Tensor:
        """Return the square around a face of a picture, [3, resolution, resolution]."""
        near = self.face(index, face, FACE_TO_MEDIUM)
        return self._pixels(near.resize((self.resolution, self.resolution), Image.Resampling.LANCZOS))

    def caption(self, index: int) -> str:
        """Return what item `index` shows: with `center_crop`, nobody whose face was cut off."""
        sample, cut_off = self.samples[index], self._cut_off(index)
        if not cut_off:
            return sample.caption
        return name_only(sample.caption, self.names - cut_off, cut_off, len(sample.faces))

    def _cut_off(self, index: int) -> set[str]:
        """Return whose face lies outside the middle square that a picture is cut to."""
        sample = self.samples[index]
        if self.face_names is None or not self.center_crop or not sample.size:
            return set()
        margins = [(length - min(sample.size)) / 2 for length in sample.size]
        return {
            name
            for name, (x1, y1, x2, y2) in zip(self.face_names[index], sample.faces, strict=True)
            for middle, margin, length in zip(
                ((x1 + x2) / 2, (y1 + y2) / 2), margins, sample.size, strict=True
            )
            if name and not margin <= middle <= length - margin
        }

    def zoomed_caption(self, index: int, face: int) -> str:
        """Return what `zoomed` shows; the picture's own caption where faces were not tied to names."""
        sample = self.samples[index]
        name = self.face_names[index][face] if self.face_names is not None else None
        if name is None:
            return sample.caption
        x1, y1, x2, y2 = sample.faces[face]
        seen = min([FACE_TO_MEDIUM, *(side / max(x2 - x1, y2 - y1, 1) for side in sample.size)])
        shot = PORTRAIT if seen < FACE_TO_PORTRAIT else MEDIUM
        others = self.names - {name}
        return near_caption(sample.caption, name, others, n_faces=len(sample.faces), shot=shot)

    def _cut(self, image: Image.Image) -> Image.Image:
        if self.aspect_buckets:
            bucket = bucket_of(image.size, self.resolution)
            return ImageOps.fit(image, bucket, Image.Resampling.LANCZOS)
        if self.center_crop:
            return ImageOps.fit(image, (self.resolution, self.resolution), Image.Resampling.LANCZOS)
        scale = self.resolution / min(image.size)
        width, height = (max(self.resolution, round(side * scale / 8) * 8) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)


def is_data(data_dir: Path) -> bool:
    """Whether a folder can be trained on as it is: it has a table, or captions beside pictures."""
    return find_table(data_dir) is not None or has_captions(data_dir)


def read_samples(
    data_dir: Path,
    instance_prompt: str = "(no caption)",
    *,
    caption_column: str | None = None,
    character_names: Sequence[str] = (),
    allow_outside_paths: bool = False,
) -> list[Sample]:
    """Return the pictures that a folder's table lists, with what the summary knows of each.

    Without a table they are the pictures with captions beside them, as `prepare` reads a source.

    Args:
        data_dir: a folder with `metadata.jsonl` or other captions, ours or anybody's.
        instance_prompt: the caption of pictures that have none.
        caption_column: of the table, as in the configuration.
        character_names: who is in a picture if its caption has the name.
        allow_outside_paths: follow links out of the folder.

    Raises:
        BunnyLoraError: as `ImageDataset`.
    """
    data_dir = paths.resolve(data_dir)
    options: Any = {"caption_column": caption_column, "allow_outside_paths": allow_outside_paths}
    if find_table(data_dir) is None and has_captions(data_dir):
        samples = _samples_beside(_listing(data_dir, instance_prompt, **options), data_dir)
        return [sample.naming(character_names) for sample in samples]
    images = (load_summary(data_dir) or {}).get("images", [])
    known = {image["file_name"]: image for image in images}
    samples = []
    for row in read_rows(data_dir, instance_prompt, **options):
        sample = sample_from(known.get(row.file_name, {}), data_dir / row.file_name, row.text)
        sample = replace(sample, prompted=row.prompted or sample.prompted)
        samples.append(sample.naming(character_names))
    return samples


def _listing(
    data_dir: Path,
    instance_prompt: str,
    *,
    caption_column: str | None = None,
    allow_outside_paths: bool = False,
) -> Listing:
    finder = Finder(data_dir, [], anywhere=allow_outside_paths)
    return read_folder(finder, instance_prompt=instance_prompt, caption_column=caption_column)


def _samples_beside(listing: Listing, data_dir: Path) -> list[Sample]:
    return [
        Sample(
            entry.frame_id,
            data_dir / entry.recorded,
            entry.caption,
            prompted=entry.prompted,
            repeats=entry.repeats,
        )
        for entry in listing.entries
        if not entry.reason
    ]


def describe_as_it_is(data_dir: Path, tokenizer: Any, **options: Any) -> dict[str, Any]:
    """Return of a folder that nobody prepared what `remarks` are made of.

    Args:
        data_dir: as in `read_samples`.
        tokenizer: as in `prepare`.
        **options: what `reading` returns.

    Raises:
        BunnyLoraError: as `ImageDataset`.
    """
    samples = read_samples(data_dir, **options)
    names = options.pop("character_names")
    listing = _listing(data_dir, **options)
    used = {sample.path.resolve() for sample in samples}
    unused = [
        Unused(
            entry.recorded or entry.frame_id, entry.reason or "a picture that the table does not list"
        )
        for entry in listing.entries
        if entry.reason or (data_dir / entry.recorded).resolve() not in used
    ]
    return {
        "n_images": len(samples),
        "n_instance_prompt": sum(sample.prompted for sample in samples),
        "characters": characters_of(samples),
        "caption_tokens": caption_tokens(samples, [fitted(s, tokenizer) for s in samples], tokenizer),
        "notes": [*listing.notes, *unseen(names, samples)],
        "unused": [asdict(item) for item in (*unused, *listing.unused)],
    }


def data_sha256(data_dir: Path, **options: Any) -> str:
    """Return one hash of all that training reads of a folder: captions, pictures, who is where in them.

    Args:
        data_dir: as in `read_samples`.
        **options: what `reading` returns.

    Raises:
        BunnyLoraError: as `ImageDataset`.
    """
    data_dir = paths.resolve(data_dir)
    samples = read_samples(data_dir, **options | {"instance_prompt": "-"})
    names = [sample.path.relative_to(data_dir).as_posix() for sample in samples]
    pictures = [data_dir / name for name in sorted(set(names))]
    if (table := find_table(data_dir)) is None:
        said = [[name, s.caption, s.repeats] for name, s in zip(names, samples, strict=True)]
        return sha256_hex((files.sha256(*pictures) + json.dumps(said)).encode())
    digest = files.sha256(table, *pictures)
    if (summary := load_summary(data_dir)) is None:
        return digest
    who = [
        [image.get(key) for key in ("file_name", "characters", "faces")] for image in summary["images"]
    ]
    return sha256_hex((digest + json.dumps(who)).encode())


def sample_indices(seed: int, n_images: int, start: int, count: int) -> list[int]:
    """Return which pictures come at positions start … start + count - 1 of the endless sample stream.

    Position p belongs to epoch p // n_images; each epoch is a shuffle of its own. A pure function of
    the arguments, so a run that is resumed at any position sees what it would have seen.
    """
    orders: dict[int, list[int]] = {}
    indices = []
    for position in range(start, start + count):
        epoch, place = divmod(position, n_images)
        if epoch not in orders:
            shuffle = seeding.generator(seed, "order", epoch)
            orders[epoch] = torch.randperm(n_images, generator=shuffle).tolist()
        indices.append(orders[epoch][place])
    return indices
