"""An image as colours and edges in a vector, for machines without a feature extractor."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

PALETTE_SIZE_PX = 64
# Shares of the three blocks in a palette vector's squared length; colour tells characters apart.
HISTOGRAM_SHARE, LAYOUT_SHARE, EDGES_SHARE = 0.7, 0.15, 0.15
N_LIGHTNESS, N_CHROMA = 4, 9  # histogram bins along L and along a and b
CHROMA_LIMIT = 80.0  # |a|, |b| of nearly all sRGB colours; the few beyond count in the outermost bin
# Of the side of the image: pixels near the middle, where pictures have their subject, count more.
CENTRE_SIGMA = 0.3
N_CELLS, N_ORIENTATIONS = 4, 8
FLAT_GRADIENT = 2.0  # L units a pixel: weaker edges than this count as none
# Linear sRGB to CIE XYZ under D65, divided by the white point: IEC 61966-2-1.
RGB_TO_XYZ = np.array(
    [
        [0.4124564 / 0.950456, 0.3575761 / 0.950456, 0.1804375 / 0.950456],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339 / 1.089058, 0.1191920 / 1.089058, 0.9503041 / 1.089058],
    ]
)


def _palette(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([_palette_row(image) for image in images]))


def _palette_row(image: Image.Image) -> np.ndarray:
    """Return the palette vector [D]: three blocks, each of the length that its share says."""
    side = (PALETTE_SIZE_PX, PALETTE_SIZE_PX)
    lab = srgb_to_lab(np.asarray(image.resize(side, Image.Resampling.BOX), np.float64) / 255)
    blocks = (
        (HISTOGRAM_SHARE, colour_histogram(lab)),
        (LAYOUT_SHARE, colour_layout(lab)),
        (EDGES_SHARE, edge_histogram(lab[..., 0])),
    )
    return np.concatenate([share**0.5 * row / np.linalg.norm(row) for share, row in blocks])


def srgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """Return CIE L*a*b* (L in 0..100) of sRGB values in 0..1, [..., 3]: CIE 15:2004, section 8.2.1."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ RGB_TO_XYZ.T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def colour_histogram(lab: np.ndarray) -> np.ndarray:
    """Return the square root of the share of each colour, [L bins x a bins x b bins].

    Colour indexing (Swain and Ballard, 1991) in Lab, the middle of the picture weighted up. Each
    pixel is shared among its neighbouring bins, so that a shade more or less of light moves it a
    little and not from one bin to the next. The square root turns the dot product into the
    Bhattacharyya coefficient of two histograms: one large background does not drown the rest.
    """
    shape = (N_LIGHTNESS, N_CHROMA, N_CHROMA)
    low_end = np.array([0, -CHROMA_LIMIT, -CHROMA_LIMIT])
    span = np.array([100, 2 * CHROMA_LIMIT, 2 * CHROMA_LIMIT])
    scaled = (lab.reshape(-1, 3) - low_end) / span
    position = scaled.clip(0, 1) * (np.array(shape) - 1)
    low = np.minimum(position.astype(int), np.array(shape) - 2)
    weights = _centre_weights(lab.shape[0]).reshape(-1)
    histogram = np.zeros(shape)
    for corner in np.ndindex(2, 2, 2):
        part = np.where(corner, position - low, 1 - (position - low)).prod(axis=1)
        np.add.at(histogram, tuple((low + corner).T), weights * part)
    return np.sqrt(histogram.reshape(-1) / weights.sum())


def _centre_weights(side: int) -> np.ndarray:
    axis = (np.arange(side) + 0.5) / side - 0.5
    bell = np.exp(-0.5 * (axis / CENTRE_SIGMA) ** 2)
    return np.outer(bell, bell)


def colour_layout(lab: np.ndarray) -> np.ndarray:
    """Return the mean colour of each cell of a coarse grid, [cells x cells x 3 + 1].

    The idea of MPEG-7's colour layout descriptor (ISO/IEC 15938-3), without its cosine transform.
    The last entry is a constant: an even mid-grey, which would be all zeros, has a direction too.
    """
    cells = _cells(lab / [50, CHROMA_LIMIT, CHROMA_LIMIT] - [1, 0, 0]).mean(axis=(1, 3))
    return np.append(cells.reshape(-1), 1.0)


def edge_histogram(lightness: np.ndarray) -> np.ndarray:
    """Return the square root of edge strength by direction and cell, [cells x cells x (8 + 1)].

    Histograms of oriented gradients (Dalal and Triggs, 2005) on L, unsigned, with an extra bin in
    every cell for "no edge here", so that flat areas agree with each other and noise stays small.
    """
    dy, dx = np.gradient(lightness)
    angle = np.arctan2(dy, dx) % np.pi
    direction = np.floor(angle / np.pi * N_ORIENTATIONS).astype(int) % N_ORIENTATIONS
    strength = np.hypot(dx, dy)[..., None] * np.eye(N_ORIENTATIONS)[direction]
    cells = _cells(strength).mean(axis=(1, 3))
    flat = np.full((*cells.shape[:2], 1), FLAT_GRADIENT)
    return np.sqrt(np.concatenate([cells, flat], axis=2)).reshape(-1)


def _cells(values: np.ndarray) -> np.ndarray:
    """View [side, side, k] as [cells, pixels, cells, pixels, k]."""
    pixels = values.shape[0] // N_CELLS
    return values.reshape(N_CELLS, pixels, N_CELLS, pixels, -1)
