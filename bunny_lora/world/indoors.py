"""The bedroom: window, bed, rug and shelf, lit by day or by a lamp."""

from __future__ import annotations

import numpy as np

from bunny_lora.world import palette, props
from bunny_lora.world.drawing import Colour, Pen, ellipse, lighter, mix, polygon, smooth, star
from bunny_lora.world.view import View, band


def draw_bedroom(view: View) -> None:
    """Draw the room; `books`, `plant` and `balloons` are its details."""
    hue = ((250, 218, 190), (196, 222, 240), (222, 206, 240))[int(view.rng.integers(3))]
    dim = {"day": 1.0, "sunset": 0.94, "night": 0.72}[view.scene.light]
    wall: Colour = tuple(round(c * dim) for c in hue)  # type: ignore[assignment]
    aspect = view.canvas.aspect
    view.canvas.gradient((0.0, wall), (1.0, lighter(wall, 0.25)))
    pen = view.layer(0.6)
    pen.tint, pen.haze_share = (dim, dim, min(1.0, dim + 0.06)), 0.0
    for x in np.arange(-0.5, aspect + 0.5, 0.16):
        pen.wash(
            polygon((x, -0.4), (x + 0.05, -0.4), (x + 0.05, 0.64), (x, 0.64)), (255, 255, 255), 0.22
        )
    window_side = -1 if view.rng.random() < 0.5 else 1
    _window(view, pen, aspect / 2 + window_side * aspect * 0.26)
    _bed(view, pen, aspect / 2 - window_side * aspect * 0.3)
    if view.has("books"):
        at = view.spot(pen, aspect / 2 - window_side * aspect * 0.28 - 0.13, 0.28)
        props.book_row(at, view.rng, 0.3)
    pen = view.layer(1.0)
    pen.tint, pen.haze_share = (dim, dim, min(1.0, dim + 0.06)), 0.0
    pen.fill(band(0.66, 0.0, 0.0, aspect), (206, 156, 108))
    pen.fill(
        band(0.645, 0.0, 0.0, aspect)[[0, -3, -3, 0]] + [(0, 0), (0, 0), (0, 0.02), (0, 0.02)],
        (250, 244, 234),
    )
    for x in np.arange(-0.6, aspect + 0.6, 0.22):
        slant = (x - aspect / 2) * 0.5
        pen.fill(
            polygon((x, 0.667), (x + 0.005, 0.667), (x + 0.012 + slant, 1.2), (x + slant, 1.2)),
            (180, 130, 88),
        )
    pen.fill(ellipse(aspect / 2, 0.88, 0.46, 0.11), (226, 110, 120))
    pen.fill(ellipse(aspect / 2, 0.88, 0.4, 0.09), (250, 200, 190))
    if view.has("plant"):
        props.potted_plant(view.spot(pen, aspect / 2 + window_side * aspect * 0.44, 0.76, 1.0))
    if view.has("balloons"):
        props.balloons(view.spot(pen, aspect / 2 - window_side * aspect * 0.4, 0.72, 1.0))


def _window(view: View, pen: Pen, x: float) -> None:
    zenith, _, horizon = palette.SKY[view.scene.light]
    y1, y2, half = 0.12, 0.44, 0.15
    pen.fill(
        polygon(
            (x - half - 0.02, y1 - 0.02),
            (x + half + 0.02, y1 - 0.02),
            (x + half + 0.02, y2 + 0.02),
            (x - half - 0.02, y2 + 0.02),
        ),
        (255, 252, 244),
    )
    view.canvas.fill(
        pen.place(polygon((x - half, y1), (x + half, y1), (x + half, y2), (x - half, y2))),
        mix(zenith, horizon, 0.35),
    )
    view.canvas.fill(pen.place(ellipse(x + 0.05, y1 + 0.09, 0.035, 0.035, n=20)), (255, 246, 200))
    hills = smooth(
        (x - half, y2), (x - half, y2 - 0.08), (x, y2 - 0.05), (x + half, y2 - 0.1), (x + half, y2)
    )
    pen.fill(hills, (110, 180, 100) if not view.night else (60, 100, 90))
    for bar in (
        polygon((x - 0.007, y1), (x + 0.007, y1), (x + 0.007, y2), (x - 0.007, y2)),
        polygon((x - half, 0.273), (x + half, 0.273), (x + half, 0.287), (x - half, 0.287)),
    ):
        pen.fill(bar, (255, 252, 244))
    for side in (-1, 1):
        edge = x + side * (half + 0.03)
        cloth = smooth(
            (edge - side * 0.1, y1 - 0.05),
            (edge + side * 0.04, y1 - 0.05),
            (edge + side * 0.05, y2 + 0.06),
            (edge - side * 0.03, y2 + 0.06),
        )
        pen.paint((cloth, (236, 120, 130)), shade=0)


def _bed(view: View, pen: Pen, x: float) -> None:
    pen.paint(
        (
            smooth((x - 0.28, 0.66), (x - 0.28, 0.44), (x, 0.38), (x + 0.28, 0.44), (x + 0.28, 0.66)),
            (168, 112, 78),
        ),
        shade=0,
    )
    pen.paint((ellipse(x, 0.53, 0.15, 0.055), (252, 250, 246)), shade=0.06)
    quilt = smooth((x - 0.3, 0.72), (x - 0.29, 0.58), (x, 0.555), (x + 0.29, 0.58), (x + 0.3, 0.72))
    pen.paint((quilt, (104, 150, 214)), shade=0.1)
    for dx in (-0.18, -0.06, 0.06, 0.18):
        pen.fill(star(x + dx, 0.635, 0.022), (255, 236, 150))
