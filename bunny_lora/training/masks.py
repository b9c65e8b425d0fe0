"""Where a view from near shows somebody else, who is not to be learnt from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bunny_lora.data.images import FACE_TO_MEDIUM, square_around
from bunny_lora.dataset import ImageDataset

# How far a body reaches from a face, in widths of it to each side, in heights of it up and down.
ASIDE, UP, DOWN = 0.4, 0.75, 2.5


def own_part(images: ImageDataset, index: int, face: int) -> torch.Tensor | None:
    """Return where the view around a face shows nobody else, [resolution / 8] squared of 1 and 0.

    Of the others it knows the faces, and takes their bodies to be below; where they stand in each
    other's way, all counts as the own one's. None where the others are not in the view.
    """
    sample, side = images.samples[index], images.resolution // 8
    if not sample.size:
        return None
    left, top, width = square_around(sample.size, sample.faces[face], FACE_TO_MEDIUM)
    mask = torch.ones(side, side)
    others = [box for place, box in enumerate(sample.faces) if place != face]
    for box, value in [*((other, 0.0) for other in others), (sample.faces[face], 1.0)]:
        x1, y1, x2, y2 = _body(box)
        rows = [_pixel((y - top) * side / width) for y in (y1, y2)]
        columns = [_pixel((x - left) * side / width) for x in (x1, x2)]
        mask[slice(*rows), slice(*columns)] = value
    return None if mask.all() else mask


def _body(face: Sequence[float]) -> tuple[float, float, float, float]:
    """Return a face's box grown to the body below it."""
    x1, y1, x2, y2 = face
    aside, height = ASIDE * (x2 - x1), y2 - y1
    return x1 - aside, y1 - UP * height, x2 + aside, y2 + DOWN * height


def _pixel(coordinate: float) -> int:
    return max(0, round(coordinate))
