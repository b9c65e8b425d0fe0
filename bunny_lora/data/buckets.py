"""Sizes of one area and several aspect ratios, so that wide pictures are trained on uncut."""

from __future__ import annotations

import math
from collections.abc import Sequence

STEP = 64  # pixels that sides are multiples of, as far as a quarter of the resolution is not less
LATENT_PX = 8


def bucket_of(size: Sequence[int], resolution: int) -> tuple[int, int]:
    """Return width and height to train a picture at: of about the area of a square, nearest in shape.

    Args:
        size: of the picture.
        resolution: the side of the square.
    """
    aspect = size[0] / size[1]
    return min(
        _buckets(resolution),
        key=lambda wh: (abs(math.log(wh[0] / wh[1] / aspect)), abs(wh[0] * wh[1] - resolution**2)),
    )


def _buckets(resolution: int) -> list[tuple[int, int]]:
    step = max(LATENT_PX, min(STEP, resolution // 4 // LATENT_PX * LATENT_PX))
    widths = range(step, 4 * resolution + 1, step)
    sizes = [(width, round(resolution**2 / width / step) * step) for width in widths]
    return [(resolution, resolution), *(size for size in sizes if size[1])]
