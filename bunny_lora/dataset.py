"""Training data on disk, read back as tensors, by position; `prepare` writes it.

The layout is the one that Hugging Face `datasets` calls `imagefolder`: pictures, and `metadata.jsonl`
beside them with one `{"file_name": …, "text": …}` a line. `data_summary.json` lies one folder above.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from bunny_lora.core import files, paths, seeding
from bunny_lora.data.captions import name_first
from bunny_lora.data.frames import Sample
from bunny_lora.data.images import crop_around, open_rgb
from bunny_lora.data.metadata import METADATA, read_rows
from bunny_lora.data.summary import (
    load_summary,
    sample_from,
    sha256_hex,
)
from bunny_lora.data.writing import fitted, prepare
from bunny_lora.errors import BunnyLoraError

FACE_TO_ZOOM = 4.0  # the side of a picture from near over its face: a head, and most of a cartoon body

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

    `samples[i]` says what is known of picture i. Item i is float32 [3, H, W] in [-1, 1]. With
    `center_crop`, H = W = `resolution`. Without it, the shorter side is `resolution` and the longer one
    the nearest multiple of 8, a latent pixel.
    """

    def __init__(
        self,
        data_dir: Path | Sequence[Sample],
        *,
        resolution: int,
        center_crop: bool,
        instance_prompt: str = "",
        tokenizer: Any = None,
    ) -> None:
        """Read the captions; pictures are opened when they are asked for.

        Args:
            data_dir: a folder with `metadata.jsonl`, ours or anybody's; or samples that are known.
            resolution: in pixels, a multiple of 8.
            center_crop: cut the middle square, or keep the whole picture.
            instance_prompt: the caption of lines that have no `text`.
            tokenizer: as in `prepare`, for folders that were prepared without one, or by others.

        Raises:
            BunnyLoraError: `metadata.jsonl` is missing or broken (names the line), or a picture is
                missing.
        """
        self.resolution, self.center_crop = resolution, center_crop
        if isinstance(data_dir, Path):
            data_dir = read_samples(data_dir, instance_prompt)
        self.samples = list(data_dir)
        if tokenizer is not None:
            self.samples = [fitted(sample, tokenizer) for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._read(index, self._cut)

    def _read(self, index: int, cut: Callable[[Image.Image], Image.Image]) -> torch.Tensor:
        path = self.samples[index].path
        try:
            image = cut(open_rgb(path))
        except Exception as error:  # Pillow's decoders raise whatever they trip over.
            raise BunnyLoraError(f"Could not read {path}: {error}. Prepare the data again.") from error
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32) / 127.5 - 1.0

    def repeats(self) -> list[int]:
        """Return how often to show each picture, so that every character is seen about as often.

        Who is in most pictures sets the measure; a picture counts for the rarest of those in it.
        """
        counts = Counter(name for sample in self.samples for name in sample.characters)
        most = max(counts.values(), default=1)
        return [
            max((round(most / counts[name]) for name in sample.characters), default=1)
            for sample in self.samples
        ]

    def can_zoom(self, index: int) -> bool:
        """Whether it is clear who would be seen from near: one name in the picture, and one face."""
        sample = self.samples[index]
        return len(sample.characters) == 1 and len(sample.faces) == 1

    def zoomed(self, index: int) -> torch.Tensor:
        """Return the square around the only face of a picture, [3, resolution, resolution]."""
        return self._read(index, lambda image: self._around(image, self.samples[index].faces[0]))

    def _around(self, image: Image.Image, face: Sequence[float]) -> Image.Image:
        near = crop_around(image, face, FACE_TO_ZOOM)
        return near.resize((self.resolution, self.resolution), Image.Resampling.LANCZOS)

    def _cut(self, image: Image.Image) -> Image.Image:
        if self.center_crop:
            return ImageOps.fit(image, (self.resolution, self.resolution), Image.Resampling.LANCZOS)
        scale = self.resolution / min(image.size)
        width, height = (max(self.resolution, round(side * scale / 8) * 8) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)


def read_samples(data_dir: Path, instance_prompt: str = "(no caption)") -> list[Sample]:
    """Return the pictures that `metadata.jsonl` lists, with what the summary knows of each.

    Args:
        data_dir: a folder with `metadata.jsonl`, ours or anybody's.
        instance_prompt: the caption of lines that have no `text`.

    Raises:
        BunnyLoraError: as `ImageDataset`.
    """
    data_dir = paths.resolve(data_dir)
    images = (load_summary(data_dir) or {}).get("images", [])
    known = {image["file_name"]: image for image in images}
    return [
        sample_from(known.get(file_name, {}), data_dir / file_name, text)
        for file_name, text in read_rows(data_dir, instance_prompt)
    ]


def data_sha256(data_dir: Path) -> str:
    """Return one hash of all that training reads of a folder: captions, pictures, who is where in them.

    Raises:
        BunnyLoraError: as `ImageDataset`.
    """
    data_dir = paths.resolve(data_dir)
    names = sorted({file_name for file_name, _ in read_rows(data_dir, "-")})
    digest = files.sha256(data_dir / METADATA, *(data_dir / name for name in names))
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
