"""Whole animals: tail, limbs, trunk, clothes and head, in the order they hide each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bunny_lora.world import faces, outfits, palette
from bunny_lora.world.attributes import Character, Traits
from bunny_lora.world.drawing import (
    Canvas,
    Colour,
    Pen,
    Point,
    Points,
    bolt,
    crescent,
    curve,
    ellipse,
    heart,
    lighter,
    ribbon,
    smooth,
    star,
)
from bunny_lora.world.ears import draw_ears, inner_ear
from bunny_lora.world.poses import Rig, build, pose


@dataclass(frozen=True)
class Extent:
    """What a character covers: `[x1, y1, x2, y2]` in picture heights, not clipped to the frame.

    `body` bounds everything drawn except the shadow, `face` the skull without ears and hat.
    """

    body: tuple[float, float, float, float]
    face: tuple[float, float, float, float]


def _bounds(outlines: list[Points]) -> tuple[float, float, float, float]:
    points = np.concatenate(outlines)
    (x1, y1), (x2, y2) = points.min(axis=0), points.max(axis=0)
    return float(x1), float(y1), float(x2), float(y2)


def draw_shadow(canvas: Canvas, character: Character) -> None:
    """Draw the soft shadow on the ground."""
    size = character.height * (1.25 if character.pose == "sleeping" else 1.0)
    faint = 0.75 if character.pose == "jumping" else 1.0
    width = 0.36 * size * faint
    canvas.glow(character.x, character.y, width, width * 0.3, (30, 24, 50), 0.55 * faint)


def draw_character(canvas: Canvas, character: Character, light: str) -> Extent:
    """Draw one character at its place and return what it covers."""
    mirrored = character.facing == "left"
    turn = 0.0 if character.facing == "front" else 1.0
    traits, cloth = character.traits, palette.CLOTH[character.traits.outfit_colour]
    rng = np.random.default_rng(character.seed)
    rig = pose(character.pose, turned=turn > 0, rng=rng)
    top = character.y - rig.lift * character.height
    pen = Pen.at(canvas, character.x, top, character.height, mirrored=mirrored)
    pen.tint = palette.TINT[light]
    pen.line = canvas.style.line * max(0.0135, 0.55 * canvas.pixel / character.height)
    own_left = -1 if mirrored else 1
    spine = np.degrees(np.arctan2(rig.chest[0] - rig.hip[0], rig.hip[1] - rig.chest[1]))
    trunk = pen.child(*rig.chest, turn=float(spine))
    _draw_back(pen, trunk, character, rig)
    _draw_body(pen, trunk, character, rig, turn)
    if character.pose != "sleeping":
        _draw_arms(pen, trunk, character, rig)
        outfits.draw_at_neck(trunk, traits.outfit, cloth)
    head = pen.child(*rig.head, turn=rig.tilt, scale=canvas.style.head)
    face = _draw_head(head, character, turn, own_left)
    if character.pose == "sleeping":
        _draw_arms(pen, trunk, character, rig)
        _draw_snores(head)
    return Extent(_bounds(pen.traces), _bounds([face]))


def _draw_back(pen: Pen, trunk: Pen, character: Character, rig: Rig) -> None:
    traits = character.traits
    cloth = palette.CLOTH[traits.outfit_colour]
    spread = {"running": 0.42, "jumping": 0.42, "sleeping": 0.22}.get(character.pose, 0.36)
    outfits.draw_behind(trunk, traits.outfit, cloth, spread)
    _draw_tail(pen.child(*rig.hip), traits, lying=character.pose == "sleeping")


def _draw_tail(pen: Pen, traits: Traits, *, lying: bool) -> None:
    fur = palette.FUR[traits.fur]
    if traits.species == "bunny":
        pen.paint((ellipse(-0.2, 0.06, 0.085, 0.08), lighter(fur, 0.55)))
    elif traits.species == "bear":
        pen.paint((ellipse(-0.21, 0.06, 0.06, 0.055), fur))
    elif traits.species == "cat":
        line = curve((-0.1, 0.12), (-0.42, 0.14), (-0.34, -0.2), 10)
        pen.paint((ribbon(line, 0.045, 0.036), fur))
    elif traits.species == "mouse":
        line = curve((-0.1, 0.15), (-0.38, 0.22), (-0.46, -0.1), 10)
        pen.paint((ribbon(line, 0.024, 0.01), palette.NOSE_PINK), shade=0)
    else:
        brush = pen.child(-0.12, 0.12, -8 if lying else 4)
        tail = smooth(
            (0.02, -0.04),
            (-0.16, -0.1),
            (-0.3, -0.28),
            (-0.37, -0.36),
            (-0.4, -0.2),
            (-0.3, 0.02),
            (-0.12, 0.1),
            (0.02, 0.06),
        )
        tip = smooth((-0.29, -0.265), (-0.37, -0.36), (-0.4, -0.2), (-0.345, -0.16))
        brush.paint((tail, fur))
        brush.fill(tip, palette.CREAM)


def _draw_body(pen: Pen, trunk: Pen, character: Character, rig: Rig, turn: float) -> None:
    traits = character.traits
    fur, stout = palette.FUR[traits.fur], build(traits.species)
    if not rig.soles:
        _draw_legs(pen, traits, rig, stout)
    trunk.paint((outfits.trunk_shape(stout), fur))
    trunk.fill(ellipse(0.045 * turn, 0.12, 0.115 * stout, 0.145), lighter(fur, 0.5))
    upright = -60.0 if character.pose == "sleeping" else 0.0
    _draw_mark(trunk.child(0.035 * turn, 0.06, turn=upright), traits)
    cloth, lying = palette.CLOTH[traits.outfit_colour], character.pose == "sleeping"
    outfits.draw_on_trunk(trunk, traits.outfit, cloth, stout, lying=lying)
    if rig.soles:
        _draw_soles(pen, traits, rig)


def _draw_legs(pen: Pen, traits: Traits, rig: Rig, stout: float) -> None:
    fur = palette.FUR[traits.fur]
    cloth = palette.CLOTH[traits.outfit_colour] if traits.outfit == "overalls" else fur
    for side, foot in zip((-1, 1), rig.feet, strict=True):
        start = (rig.hip[0] + side * 0.095 * stout, rig.hip[1] + 0.09)
        knee = ((start[0] + foot[0]) / 2 + 0.01 * side, (start[1] + foot[1]) / 2)
        leg = ribbon(curve(start, knee, foot, 5), 0.075 * stout, 0.06)
        pen.paint((leg, cloth), shade=0)
        pen.paint((ellipse(foot[0] + 0.012 * side, foot[1] + 0.005, 0.098, 0.052), fur))


def _draw_soles(pen: Pen, traits: Traits, rig: Rig) -> None:
    fur = palette.FUR[traits.fur]
    for side, (x, y) in zip((-1, 1), rig.feet, strict=True):
        foot = pen.child(x, y, side * 14)
        foot.paint((ellipse(0, 0, 0.082, 0.098), fur))
        foot.fill(ellipse(0, 0.02, 0.045, 0.046), inner_ear(fur))
        for toe in (-0.04, 0.0, 0.04):
            foot.fill(ellipse(toe, -0.052 + abs(toe) * 0.3, 0.016, 0.018, n=12), inner_ear(fur))


def _draw_arms(pen: Pen, trunk: Pen, character: Character, rig: Rig) -> None:
    traits = character.traits
    fur, stout = palette.FUR[traits.fur], build(traits.species)
    sleeve = traits.outfit in outfits.SLEEVED
    for side, elbow, hand in zip((-1, 1), rig.elbows, rig.hands, strict=True):
        if character.pose == "sleeping" and side < 0:
            continue  # it lies on that arm
        shoulder = _shoulder(pen, trunk, side * 0.125 * stout)
        line = curve(shoulder, elbow, hand, 9)
        pen.paint((ribbon(line, 0.055, 0.052), fur), (ellipse(*hand, 0.062, 0.062), fur))
        if sleeve:
            cloth = palette.CLOTH[traits.outfit_colour]
            pen.paint((ribbon(line[:7], 0.064, 0.062), cloth), shade=0.08)


def _shoulder(pen: Pen, trunk: Pen, x: float) -> Point:
    at = (trunk.place(np.array([x, -0.01])) - pen.origin) @ np.linalg.inv(pen.matrix)
    return float(at[0]), float(at[1])


def _spot(x: float, y: float, radius: float) -> Points:
    return ellipse(x, y, radius, radius)


_MARKS = {"heart": heart, "star": star, "moon": crescent, "bolt": bolt, "spot": _spot}


def _draw_mark(pen: Pen, traits: Traits) -> None:
    if traits.mark == "none":
        return
    colour: Colour = palette.CLOTH[traits.mark_colour]
    shape = _MARKS[traits.mark](0, 0, 0.075 if traits.mark == "spot" else 0.092)
    flip = np.sign(np.linalg.det(pen.matrix))  # a mark reads the same from both sides
    pen.paint((shape * (flip, 1), colour), shade=0)


def _draw_head(pen: Pen, character: Character, turn: float, own_left: int) -> Points:
    traits, asleep = character.traits, character.pose == "sleeping"
    draw_ears(pen, traits, turn, own_left)
    skull = faces.draw_skull(pen, traits, turn)
    faces.draw_face(pen, traits, character.expression, turn, asleep=asleep)
    outfits.draw_on_head(pen, traits.outfit, palette.CLOTH[traits.outfit_colour], -own_left)
    return skull


def _draw_snores(head: Pen) -> None:
    flip = float(np.sign(head.matrix[0, 0]))
    for x, y, size in ((0.3, -0.24, 0.035), (0.4, -0.36, 0.05)):
        corners = np.array([(-1, -1), (1, -1), (-1, 1), (1, 1)]) * size * (flip, 1) + (x, y)
        head.paint((ribbon(corners, size * 0.3), (255, 255, 255)), shade=0)
