"""Backgrounds: seven places in layers, far ones smaller and paler, in three lights.

Scene coordinates are picture heights with the horizon near y = 0.6. The camera zooms by layer, far
ones less, so a close-up is not simply an enlarged wide shot.
"""

from __future__ import annotations

import numpy as np

from bunny_lora.world import palette, props
from bunny_lora.world.attributes import Scene
from bunny_lora.world.drawing import (
    Canvas,
    Colour,
    Pen,
    curve,
    ellipse,
    lighter,
    mix,
    polygon,
    star,
)
from bunny_lora.world.indoors import draw_bedroom
from bunny_lora.world.view import View, band

_PETALS = ((252, 250, 244), (244, 134, 172), (250, 206, 56), (178, 130, 226))


def _sky(view: View) -> None:
    zenith, middle, horizon = palette.SKY[view.scene.light]
    view.canvas.gradient((0.0, zenith), (0.35, middle), (0.66, horizon), (1.0, horizon))
    pen = view.layer(0.0)
    x, y = view.canvas.aspect * view.rng.uniform(0.12, 0.88), view.rng.uniform(0.12, 0.24)
    if view.night:
        _stars(view, 26)
        _moon(view, pen, x, y)
        return
    sun = (255, 244, 190) if view.scene.light == "day" else (255, 224, 140)
    y = y if view.scene.light == "day" else 0.47
    at = pen.place(np.array([x, y]))
    view.canvas.glow(float(at[0]), float(at[1]), 0.36, 0.36, sun, 0.85)
    view.canvas.fill(pen.place(ellipse(x, y, 0.065, 0.065)), (255, 250, 218))
    for cloud_x in view.xs(3, 0.1):
        _cloud(view, pen, float(cloud_x), float(view.rng.uniform(0.08, 0.36)))


def _stars(view: View, n: int) -> None:
    for x, y, size in view.rng.uniform((0, 0, 0.003), (view.canvas.aspect, 0.5, 0.009), (n, 3)):
        view.canvas.fill(star(x, y, max(size, 0.8 * view.canvas.pixel), 4, 0.4), (255, 246, 210))


def _moon(view: View, pen: Pen, x: float, y: float) -> None:
    at = pen.place(np.array([x, y]))
    view.canvas.glow(float(at[0]), float(at[1]), 0.22, 0.22, (210, 220, 255), 0.5)
    view.canvas.fill(pen.place(ellipse(x, y, 0.06, 0.06)), (252, 246, 220))
    for dx, dy, r in ((-0.02, -0.015, 0.014), (0.02, 0.01, 0.011), (-0.005, 0.028, 0.008)):
        view.canvas.fill(pen.place(ellipse(x + dx, y + dy, r, r, n=14)), (228, 220, 196))


def _cloud(view: View, pen: Pen, x: float, y: float) -> None:
    white = mix(
        (255, 255, 255),
        palette.SKY[view.scene.light][1],
        0.0 if view.scene.light == "day" else 0.35,
    )
    size = float(view.rng.uniform(0.6, 1.1))
    for dx, dy, r in (
        (-0.09, 0.01, 0.04),
        (-0.03, -0.02, 0.06),
        (0.05, -0.01, 0.05),
        (0.11, 0.015, 0.03),
    ):
        puff = ellipse(x + dx * size, y + dy * size, r * size * 1.2, r * size, n=20)
        view.canvas.wash(pen.place(puff), white, 0.8)


def _hills(view: View, colour: Colour, y: float, height: float, depth: float, waves: float) -> None:
    pen = view.layer(depth)
    phase = float(view.rng.uniform(0, 6.3))
    shape = band(y, height, phase, view.canvas.aspect, waves)
    shade = mix(pen.lit(colour), view.horizon, 0.55 * (1 - depth))
    view.canvas.fill(pen.place(shape), shade)


def _tufts(view: View, pen: Pen, colour: Colour, n: int) -> None:
    for x in view.xs(n):
        y = float(view.rng.uniform(0.68, 1.0))
        for lean in (-0.018, 0.0, 0.018):
            blade = polygon((x - 0.006, y), (x + 0.006, y), (x + lean, y - 0.035))
            pen.fill(blade, colour)


def _forest(view: View) -> None:
    _sky(view)
    _hills(view, (92, 156, 110), 0.5, 0.04, 0.2, 3.0)
    for depth, n, y, scale in ((0.35, 8, 0.6, 0.75), (0.7, 6, 0.65, 1.05)):
        pen = view.layer(depth)
        for x in view.xs(n, 0.25):
            leaves = mix((58, 132, 76), (112, 168, 70), float(view.rng.random()))
            leaves = mix(leaves, (150, 205, 185), 0.4 * (1 - depth))
            thing = view.spot(pen, float(x), y, scale * float(view.rng.uniform(0.85, 1.15)))
            if view.rng.random() < 0.5:
                props.fir_tree(thing, leaves)
            else:
                props.round_tree(thing, leaves)
    _hills(view, (104, 160, 82), 0.66, 0.012, 1.0, 4.0)
    pen = view.layer(1.0)
    _tufts(view, pen, (78, 132, 66), 12)
    for detail, draw, n in (("logs", props.log, 1), ("mushrooms", props.mushroom, 4)):
        if view.has(detail):
            for x in view.sides(n):
                draw(view.spot(pen, x, float(view.rng.uniform(0.72, 0.86)), 1.15))
    if view.has("ferns"):
        for x in view.sides(4):
            props.fern(view.spot(pen, x, float(view.rng.uniform(0.76, 0.95)), 1.3), (52, 118, 66))


def _meadow(view: View) -> None:
    _sky(view)
    _hills(view, (134, 196, 120), 0.52, 0.05, 0.15, 3.4)
    _hills(view, (126, 198, 92), 0.58, 0.035, 0.5, 2.4)
    far = view.layer(0.5)
    for x in view.xs(3, 0.1):
        props.round_tree(view.spot(far, float(x), 0.6, 0.42), (98, 172, 88))
    if view.has("fence"):
        props.fence(view.spot(view.layer(0.8), -0.3, 0.7, 1.1), view.canvas.aspect + 0.4)
    _hills(view, (140, 208, 88), 0.68, 0.012, 1.0, 3.0)
    pen = view.layer(1.0)
    _tufts(view, pen, (104, 176, 70), 14)
    if view.has("flowers"):
        for x in view.xs(9):
            petals = _PETALS[int(view.rng.integers(len(_PETALS)))]
            props.flower(view.spot(pen, float(x), float(view.rng.uniform(0.74, 1.0)), 1.1), petals)
    if view.has("butterflies"):
        for x in view.sides(3):
            colour = _PETALS[1 + int(view.rng.integers(3))]
            props.butterfly(view.spot(pen, x, float(view.rng.uniform(0.3, 0.55)), 1.2), colour)


def _beach(view: View) -> None:
    _sky(view)
    pen = view.layer(0.4)
    sea = band(0.52, 0.0, 0.0, view.canvas.aspect)
    pen.fill(sea, (58, 160, 206))
    for x in view.xs(7):
        y = float(view.rng.uniform(0.54, 0.63))
        pen.wash(ellipse(float(x), y, 0.08, 0.004, n=14), (255, 255, 255), 0.7)
    if view.has("sailboat"):
        colour = _PETALS[1 + int(view.rng.integers(3))]
        props.sailboat(view.spot(pen, view.sides(1)[0], 0.545, 0.9), colour)
    _hills(view, (250, 250, 244), 0.652, 0.01, 1.0, 7.0)
    view.rng.random()
    _hills(view, (246, 220, 158), 0.668, 0.008, 1.0, 5.0)
    pen = view.layer(1.0)
    for x in view.xs(5):
        pen.wash(
            ellipse(float(x), float(view.rng.uniform(0.74, 1.0)), 0.1, 0.012, n=16),
            (214, 180, 118),
            0.45,
        )
    if view.has("palm"):
        props.palm(view.spot(view.layer(0.8), view.sides(1)[0], 0.71, 1.1))
    if view.has("umbrella"):
        props.umbrella(view.spot(pen, view.sides(1)[0], 0.76, 1.0), (232, 84, 84))
    shell = view.spot(pen, view.sides(1)[0], 0.93)
    shell.paint((star(0, 0, 0.04), (246, 150, 110)), shade=0)


def _snow(view: View) -> None:
    _sky(view)
    _hills(view, (176, 200, 230), 0.46, 0.09, 0.1, 3.1)
    for depth, n, y in ((0.4, 6, 0.6), (0.7, 4, 0.64)):
        pen = view.layer(depth)
        for x in view.xs(n, 0.2):
            leaves = mix((66, 124, 110), (190, 214, 226), 0.35 * (1 - depth))
            size = 0.6 + 0.4 * depth
            props.fir_tree(view.spot(pen, float(x), y, size), leaves, (246, 250, 255))
    if view.has("cabin"):
        props.cabin(view.spot(view.layer(0.7), view.sides(1)[0], 0.67, 1.1), lamps=view.night)
    _hills(view, (240, 246, 254), 0.66, 0.015, 1.0, 3.0)
    pen = view.layer(1.0)
    for x in view.xs(5):
        pen.wash(
            ellipse(float(x), float(view.rng.uniform(0.74, 1.0)), 0.14, 0.016, n=16),
            (190, 212, 238),
            0.5,
        )
    if view.has("snowman"):
        props.snowman(view.spot(pen, view.sides(1)[0], 0.78, 0.9))


def _snowfall(view: View) -> None:
    for x, y, r in view.rng.uniform((0, 0, 0.005), (view.canvas.aspect, 1, 0.012), (34, 3)):
        view.canvas.fill(ellipse(x, y, r, r, n=10), (252, 254, 255))


def _city(view: View) -> None:
    view.canvas.gradient((0.0, (26, 24, 70)), (0.6, (104, 76, 140)), (1.0, (104, 76, 140)))
    if view.has("stars"):
        _stars(view, 30)
    _moon(view, view.layer(0.0), float(view.sides(1)[0]), 0.15)
    for depth, wall, low, high in (
        (0.3, (74, 62, 116), 0.32, 0.55),
        (0.7, (50, 46, 90), 0.18, 0.42),
    ):
        pen = view.layer(depth)
        pen.tint, pen.haze_share = (1.0, 1.0, 1.0), 0.0
        x = -0.3
        while x < view.canvas.aspect + 0.3:
            width, height = view.rng.uniform(0.13, 0.24), view.rng.uniform(low, high)
            tone = lighter(wall, float(view.rng.uniform(0, 0.12)))
            props.house_block(view.spot(pen, x, 0.68), view.rng, width, height, tone)
            x += width + 0.015
    pen = view.layer(1.0)
    pen.tint, pen.haze_share = (1.0, 1.0, 1.0), 0.0
    pen.fill(band(0.68, 0.0, 0.0, view.canvas.aspect), (96, 88, 124))
    pen.fill(band(0.72, 0.0, 0.0, view.canvas.aspect), (66, 62, 96))
    for x in np.arange(-0.4, view.canvas.aspect + 0.4, 0.32):
        pen.fill(
            polygon((x, 0.9), (x + 0.16, 0.9), (x + 0.14, 0.925), (x - 0.02, 0.925)),
            (240, 220, 150),
        )
    if view.has("billboard"):
        colour = ((222, 62, 92), (64, 132, 214))[int(view.rng.integers(2))]
        props.billboard(view.spot(pen, view.sides(1)[0], 0.71, 0.9), colour)
    if view.has("lamps"):
        for x in view.sides(2):
            props.street_lamp(view.spot(pen, x, 0.72))


def _desert(view: View) -> None:
    _sky(view)
    if view.has("pyramids"):
        pen = view.layer(0.25)
        for x, scale in zip(view.sides(2), (1.0, 0.65), strict=True):
            props.pyramid(view.spot(pen, x, 0.6, scale))
    _hills(view, (226, 160, 108), 0.56, 0.05, 0.3, 3.0)
    _hills(view, (238, 180, 112), 0.62, 0.03, 0.6, 2.2)
    if view.has("cacti"):
        pen = view.layer(0.8)
        for x in view.sides(3):
            props.cactus(view.spot(pen, x, 0.7, float(view.rng.uniform(0.7, 1.1))))
    _hills(view, (246, 198, 126), 0.69, 0.015, 1.0, 3.0)
    pen = view.layer(1.0)
    for x in view.xs(5):
        y = float(view.rng.uniform(0.76, 1.0))
        ripple = curve((float(x) - 0.12, y), (float(x), y - 0.03), (float(x) + 0.12, y))
        pen.stroke(ripple, 0.005, (224, 166, 98))
    if view.has("rocks"):
        for x in view.sides(3):
            props.rock(view.spot(pen, x, float(view.rng.uniform(0.74, 0.92))), (196, 128, 92))


_PLACES = {
    "forest": _forest,
    "meadow": _meadow,
    "beach": _beach,
    "snow": _snow,
    "city": _city,
    "bedroom": draw_bedroom,
    "desert": _desert,
}


def draw_scene(canvas: Canvas, scene: Scene) -> None:
    """Draw everything behind the characters; the same scene is the same picture."""
    _PLACES[scene.place](View(canvas, scene, np.random.default_rng(scene.seed)))


def draw_foreground(canvas: Canvas, scene: Scene) -> None:
    """Draw what falls in front of the characters: snowflakes."""
    if scene.place == "snow" and "snowfall" in scene.details:
        _snowfall(View(canvas, scene, np.random.default_rng(scene.seed + 1)))
