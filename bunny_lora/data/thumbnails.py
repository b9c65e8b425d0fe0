"""Pictures so small that they are quick to compare, and which of them are nearly the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bunny_lora.core.progress import progress
from bunny_lora.data.images import open_rgb
from bunny_lora.errors import BunnyLoraError

GRID = (16, 9)
SAME_PICTURE = 0.12  # of full contrast, the cell that changes most: an arm that moves is 0.2 and more


def thumbnails(paths: Iterable[Path]) -> list[np.ndarray]:
    """Return each picture as the mean colours of a grid, float32 [9, 16, 3] in [0, 1].

    Raises:
        BunnyLoraError: a picture cannot be read.
    """
    return [_thumbnail(path) for path in progress(list(paths), desc="compare pictures", delay=2.0)]


def _thumbnail(path: Path) -> np.ndarray:
    try:
        small = open_rgb(path).resize(GRID, Image.Resampling.BOX)
    except Exception as error:  # Pillow's decoders raise whatever they trip over.
        raise BunnyLoraError(f"Could not read {path}: {error}. Prepare the data again.") from error
    return np.asarray(small, np.float32) / 255


def near_duplicates(pictures: Sequence[np.ndarray]) -> list[int]:
    """Return the number of each picture's group: neighbours that differ little from its first one."""
    groups: list[int] = []
    first = 0
    for index, picture in enumerate(pictures):
        if not groups or _changes(pictures[first], picture).max() > SAME_PICTURE:
            first = index
        groups.append(first)
    return groups


def _changes(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.abs(first - second).mean(-1)
