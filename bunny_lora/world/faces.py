"""Heads: skull, ears, eyes, snout and mouth, in head coordinates.

A head pen stands at the middle of the skull; the skull reaches about 0.28 to each side. `turn` is 0
for a face seen from the front and 1 for one turned to the right, and shifts the features sideways.
"""

from __future__ import annotations

from bunny_lora.world import palette
from bunny_lora.world.attributes import Traits
from bunny_lora.world.drawing import (
    Colour,
    Pen,
    Points,
    curve,
    darker,
    ellipse,
    inflate,
    lighter,
    mix,
    polygon,
    smooth,
)

_SKULLS: dict[str, Points] = {
    "bunny": smooth(
        (0, -0.25),
        (0.21, -0.17),
        (0.285, 0.05),
        (0.19, 0.21),
        (0, 0.245),
        (-0.19, 0.21),
        (-0.285, 0.05),
        (-0.21, -0.17),
    ),
    "cat": smooth(
        (0, -0.22),
        (0.2, -0.18),
        (0.3, 0.02),
        (0.24, 0.18),
        (0, 0.235),
        (-0.24, 0.18),
        (-0.3, 0.02),
        (-0.2, -0.18),
    ),
    "bear": smooth(
        (0, -0.245),
        (0.22, -0.17),
        (0.3, 0.03),
        (0.21, 0.2),
        (0, 0.245),
        (-0.21, 0.2),
        (-0.3, 0.03),
        (-0.22, -0.17),
    ),
    "fox": smooth(
        (0, -0.22),
        (0.2, -0.17),
        (0.28, 0.0),
        (0.36, 0.12),
        (0.2, 0.19),
        (0, 0.255),
        (-0.2, 0.19),
        (-0.36, 0.12),
        (-0.28, 0.0),
        (-0.2, -0.17),
    ),
    "mouse": smooth(
        (0, -0.23),
        (0.2, -0.16),
        (0.265, 0.04),
        (0.16, 0.19),
        (0, 0.24),
        (-0.16, 0.19),
        (-0.265, 0.04),
        (-0.2, -0.16),
    ),
}


def draw_skull(pen: Pen, traits: Traits, turn: float) -> Points:
    """Draw the bare head with its fur pattern; return its outline in canvas coordinates."""
    fur = palette.FUR[traits.fur]
    skull = _SKULLS[traits.species]
    pen.paint((skull, fur))
    face = pen.place(inflate(skull, pen.line))
    shift = 0.06 * turn
    pale = lighter(fur, 0.72)
    if traits.species == "fox":
        for side in (-1, 1):
            cheek = smooth(
                (shift, 0.02),
                (side * 0.2, 0.06),
                (side * 0.33, 0.12),
                (side * 0.19, 0.175),
                (shift, 0.235),
            )
            pen.fill(cheek, pale)
    elif traits.species == "cat":
        for x, length in ((-0.07, 0.07), (0.0, 0.1), (0.07, 0.07)):
            top = (x + shift, -0.205 + abs(x) * 0.2)
            pen.stroke(
                curve(top, (top[0] * 0.9, top[1] + length / 2), (top[0] * 0.7, top[1] + length), 4),
                0.013,
                darker(fur, 0.35),
            )
    elif traits.species == "bunny":
        pen.fill(ellipse(shift * 1.4, 0.13, 0.15, 0.09), lighter(fur, 0.5))
    return face


def draw_face(pen: Pen, traits: Traits, expression: str, turn: float, *, asleep: bool) -> None:
    """Draw snout, mouth, cheeks and eyes."""
    shift = 0.085 * turn
    for x in (-0.12, 0.25) if turn else (-0.2, 0.2):
        pen.wash(ellipse(x, 0.105, 0.05, 0.035, n=16), palette.BLUSH, 0.45)
    _draw_snout(pen.child(shift, 0), traits, "asleep" if asleep else expression)
    closed = asleep or expression == "laughing"
    for side in (-1, 1):
        far = turn > 0 and side > 0
        at = (shift * 1.05 + side * (0.112 if not far else 0.098), -0.02)
        eye = pen.child(*at, scale=1.0)
        squeeze = 0.82 if far else 1.0
        if closed:
            _closed_eye(eye, asleep, palette.ink_on(palette.FUR[traits.fur]))
        else:
            _open_eye(eye, traits, expression, side, squeeze, 0.014 * turn)
        _draw_brow(eye, traits, expression, side)


def _closed_eye(pen: Pen, asleep: bool, ink: Colour) -> None:
    bend = 0.05 if asleep else -0.075
    base = 0.015 if asleep else 0.03
    pen.stroke(curve((-0.06, base), (0, base + bend * 1.5), (0.06, base)), 0.013, ink)


def _open_eye(
    pen: Pen, traits: Traits, expression: str, side: int, squeeze: float, gaze: float
) -> None:
    big = 1.14 if expression == "surprised" else 1.0
    rx, ry = 0.071 * squeeze * big, 0.09 * big
    pen.fill(ellipse(0, 0, rx + 0.011, ry + 0.011), palette.INK)
    pen.fill(ellipse(0, 0, rx, ry), (255, 255, 255))
    iris = palette.IRIS[traits.eyes]
    small = 0.8 if expression == "surprised" else 1.0
    ix, iy = 0.054 * squeeze * small, 0.064 * small
    pen.fill(ellipse(gaze, 0.012, ix + 0.004, iy + 0.004), darker(iris, 0.4))
    pen.fill(ellipse(gaze, 0.018, ix, iy - 0.002), iris)
    pen.fill(ellipse(gaze, 0.01, ix * 0.62, iy * 0.66), palette.INK)
    pen.fill(ellipse(gaze - 0.018, -0.022, 0.021 * squeeze, 0.024, n=16), (255, 255, 255))
    pen.fill(ellipse(gaze + 0.02, 0.04, 0.011, 0.012, n=12), (255, 255, 255))
    if expression == "sleepy":
        inner, outer = -side * (rx + 0.012), side * (rx + 0.012)
        lid = polygon(
            (inner, -0.004),
            (inner * 0.95, -0.05),
            (inner * 0.5, -ry - 0.012),
            (outer * 0.5, -ry - 0.012),
            (outer * 0.95, -0.05),
            (outer, 0.03),
        )
        pen.fill(lid, darker(palette.FUR[traits.fur], 0.16))
        pen.stroke(curve((inner, -0.004), (0, 0.035), (outer, 0.03), 5), 0.011, palette.INK)


def _draw_brow(pen: Pen, traits: Traits, expression: str, side: int) -> None:
    inner, outer, height = {
        "sad": (-0.045, 0.02, -0.13),
        "angry": (0.055, -0.02, -0.1),
        "surprised": (0.0, 0.015, -0.155),
    }.get(expression, (0.0, 0.0, 0.0))
    if not height:
        return
    ends = polygon((-side * 0.065, height + inner), (side * 0.065, height + outer))
    pen.stroke(ends, 0.016, darker(palette.FUR[traits.fur], 0.8))


_MOUTH_Y = {"bunny": 0.135, "cat": 0.135, "bear": 0.145, "fox": 0.165, "mouse": 0.15}


def _draw_snout(pen: Pen, traits: Traits, mood: str) -> None:
    fur, species = palette.FUR[traits.fur], traits.species
    y = _MOUTH_Y[species]
    if species == "bear":
        pen.paint((ellipse(0, 0.115, 0.13, 0.098), lighter(fur, 0.6)), shade=0.0)
    if species in ("cat", "mouse", "bunny"):
        for side in (-1, 1):
            for droop in (-0.015, 0.03):
                pen.stroke(
                    polygon((side * 0.15, 0.115 + droop * 0.6), (side * 0.33, 0.1 + droop * 1.8)),
                    0.006,
                    mix(fur, palette.ink_on(fur), 0.6),
                )
    pale_muzzle = species in ("bear", "fox", "bunny")
    ink = palette.INK if pale_muzzle else palette.ink_on(fur)
    _draw_mouth(pen.child(0, y), mood, ink, teeth=species == "bunny")
    if species == "bear":
        pen.fill(ellipse(0, 0.062, 0.06, 0.042), palette.INK)
        pen.fill(ellipse(-0.015, 0.048, 0.018, 0.01, n=12), (220, 210, 220))
    elif species == "fox":
        pen.fill(ellipse(0, 0.095, 0.05, 0.036), palette.INK)
        pen.fill(ellipse(-0.012, 0.083, 0.015, 0.009, n=12), (220, 210, 220))
    elif species == "mouse":
        pen.fill(ellipse(0, 0.09, 0.05, 0.042), darker(palette.NOSE_PINK, 0.35))
        pen.fill(ellipse(-0.003, 0.086, 0.042, 0.034), palette.NOSE_PINK)
    else:
        nose = smooth((-0.042, 0.062), (0, 0.054), (0.042, 0.062), (0.0, 0.102), n_steps=4)
        pen.paint((nose, palette.NOSE_PINK), shade=0.0)


def _draw_mouth(pen: Pen, mood: str, ink: Colour, *, teeth: bool) -> None:
    if mood == "laughing":
        mouth = smooth(
            (-0.085, -0.01), (0, 0.004), (0.085, -0.01), (0.055, 0.062), (0, 0.085), (-0.055, 0.062)
        )
        pen.fill(mouth * 1.12, palette.INK)
        pen.fill(mouth, (150, 40, 58))
        pen.fill(ellipse(0, 0.062, 0.04, 0.022), (240, 110, 120))
    elif mood == "surprised":
        pen.fill(ellipse(0, 0.03, 0.036, 0.046), palette.INK)
        pen.fill(ellipse(0, 0.036, 0.024, 0.032), (150, 40, 58))
    elif mood == "asleep":
        pen.stroke(curve((-0.03, 0.0), (0, 0.02), (0.03, 0.0), 5), 0.01, ink)
    else:
        _draw_lips(pen, mood, ink)
    if teeth and mood in ("happy", "laughing"):
        pen.fill(
            polygon((-0.026, 0.006), (0.026, 0.006), (0.022, 0.046), (-0.022, 0.046)), palette.CREAM
        )
        pen.stroke(polygon((0, 0.01), (0, 0.044)), 0.004, palette.INK)


def _draw_lips(pen: Pen, mood: str, ink: Colour) -> None:
    width, bend = {
        "happy": (0.085, 0.07),
        "sad": (0.06, -0.055),
        "angry": (0.065, -0.03),
        "sleepy": (0.035, 0.015),
    }[mood]
    base = 0.035 if bend < 0 else -0.005
    line = curve((-width, base), (0, base + bend * 1.6), (width, base))
    pen.stroke(line, 0.011, ink)
