"""Ears by species, and the peculiar one that tells a hero from everybody else.

Drawn by the head pen of `faces`; `side` is -1 for the ear on the viewer's left and 1 for the other.
"""

from __future__ import annotations

import numpy as np

from bunny_lora.world import palette
from bunny_lora.world.attributes import Traits
from bunny_lora.world.drawing import (
    Colour,
    Pen,
    Points,
    curve,
    darker,
    ellipse,
    lighter,
    mix,
    polygon,
    ribbon,
    smooth,
)


def inner_ear(fur: Colour) -> Colour:
    """Return the skin inside an ear of that fur."""
    return mix(lighter(fur, 0.35), (246, 150, 165), 0.62)


def draw_ears(pen: Pen, traits: Traits, turn: float, own_left: int) -> None:
    """Draw both ears; the one on the animal's `own_left` side (+1 or -1) bears the peculiarity."""
    for side in (-1, 1):
        peculiar = traits.ear if side == own_left else "plain"
        root = pen.child(-0.03 * turn, 0)
        _EARS[traits.species](root, side, traits, peculiar)


def _bunny_ear(pen: Pen, side: int, traits: Traits, peculiar: str) -> None:
    fur = palette.FUR[traits.fur]
    ear = pen.child(side * 0.12, -0.19, side * 13)
    if peculiar == "bent":
        line = _bent(side)
        ear.paint((ribbon(line, 0.075, 0.06), fur))
        ear.fill(ribbon(line[2:] * (0.98, 1.0), 0.034, 0.026), inner_ear(fur))
        return
    ear.paint((ellipse(0, -0.24, 0.085, 0.30), fur))
    ear.fill(ellipse(0, -0.25, 0.045, 0.22), inner_ear(fur))


def _bent(side: int) -> Points:
    up = curve((0, 0.03), (0, -0.36), (side * 0.11, -0.36), 9)
    down = curve((side * 0.11, -0.36), (side * 0.25, -0.36), (side * 0.26, -0.1), 9)
    return np.concatenate([up, down[1:]])


def _pointed_ear(
    pen: Pen, side: int, traits: Traits, peculiar: str, *, width: float, tip: float
) -> None:
    fur = palette.FUR[traits.fur]
    ear = pen.child(side * 0.17, -0.15, side * 16)
    shape = smooth(
        (-width, 0.05),
        (-width * 0.72, -tip * 0.5),
        (0, -tip),
        (width * 0.72, -tip * 0.5),
        (width, 0.05),
    )
    dipped = peculiar == "dipped"
    ear.paint((shape, palette.CREAM if dipped else fur))
    ear.fill(shape * (0.58, 0.68), inner_ear(fur))
    if traits.species == "fox" and not dipped:
        point = smooth(
            (-width * 0.5, -tip * 0.68), (0, -tip), (width * 0.5, -tip * 0.68), (0, -tip * 0.58)
        )
        ear.fill(point, darker(fur, 0.75))
    if peculiar == "ringed":
        for radius, colour in ((0.062, (150, 96, 20)), (0.05, (255, 208, 60))):
            ear.fill(ellipse(side * width * 0.6, -tip * 0.42, radius, radius), colour)
        ear.fill(ellipse(side * width * 0.6, -tip * 0.42, 0.024, 0.024), darker(fur, 0.4))


def _cat_ear(pen: Pen, side: int, traits: Traits, peculiar: str) -> None:
    _pointed_ear(pen, side, traits, peculiar, width=0.125, tip=0.2)


def _fox_ear(pen: Pen, side: int, traits: Traits, peculiar: str) -> None:
    _pointed_ear(pen, side, traits, peculiar, width=0.125, tip=0.29)


def _bear_ear(pen: Pen, side: int, traits: Traits, peculiar: str) -> None:
    fur = palette.FUR[traits.fur]
    ear = pen.child(side * 0.2, -0.19)
    ear.paint((ellipse(0, 0, 0.105, 0.105), fur))
    ear.fill(ellipse(0, 0.015, 0.058, 0.062), inner_ear(fur))
    if peculiar == "bandaged":
        wrap = ear.child(side * 0.03, -0.035, side * 45)
        wrap.paint((ribbon(polygon((-0.085, 0), (0.085, 0)), 0.026), palette.CREAM), shade=0)
        for turn in ((0, 0.016), (0.016, 0)):
            wrap.stroke(polygon((-turn[0], -turn[1]), turn), 0.008, (222, 62, 62))


def _mouse_ear(pen: Pen, side: int, traits: Traits, peculiar: str) -> None:
    fur = palette.FUR[traits.fur]
    ear = pen.child(side * 0.25, -0.19)
    ear.paint((ellipse(0, 0, 0.18, 0.18), fur))
    ear.fill(ellipse(0, 0.005, 0.125, 0.125), inner_ear(fur))


_EARS = {
    "bunny": _bunny_ear,
    "cat": _cat_ear,
    "bear": _bear_ear,
    "fox": _fox_ear,
    "mouse": _mouse_ear,
}
