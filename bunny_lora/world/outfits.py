"""Clothes, in pieces: behind the body, on the trunk, around the neck, on the head.

A trunk pen stands at the chest with y running down the spine to the hips at y = `LENGTH`; a head
pen is the one of `faces`.
"""

from __future__ import annotations

from bunny_lora.world.drawing import (
    Colour,
    Pen,
    Points,
    curve,
    darker,
    ellipse,
    lighter,
    polygon,
    ribbon,
    smooth,
    star,
    taper,
)

LENGTH = 0.17
CHEST_RADIUS, HIP_RADIUS = 0.145, 0.19
SLEEVED = ("shirt", "sweater")


def trunk_shape(stout: float, grow: float = 0.0, end: float = LENGTH) -> Points:
    """Return the body from the chest down to `end`, grown by `grow` on all sides."""
    share = end / LENGTH
    radius = CHEST_RADIUS + (HIP_RADIUS - CHEST_RADIUS) * share
    return taper((0, 0), CHEST_RADIUS * stout + grow, (0, end), radius * stout + grow)


def draw_behind(pen: Pen, outfit: str, colour: Colour, spread: float) -> None:
    """Draw what hangs behind the body (trunk pen), `spread` to each side at the hem."""
    if outfit == "cape":
        cloth = smooth(
            (-0.13, -0.12),
            (0.13, -0.12),
            (spread * 0.82, 0.12),
            (spread, 0.33),
            (0.1, 0.31),
            (0, 0.34),
            (-0.1, 0.31),
            (-spread, 0.33),
            (-spread * 0.82, 0.12),
        )
        pen.paint((cloth, darker(colour, 0.12)))
        for x in (-0.2, 0.2):
            pen.stroke(curve((x * 0.8, 0.0), (x, 0.1), (x * 1.4, 0.28), 5), 0.008, darker(colour, 0.4))


def draw_on_trunk(pen: Pen, outfit: str, colour: Colour, stout: float, *, lying: bool) -> None:
    """Draw what covers the trunk (trunk pen); `lying` flattens the skirt."""
    if outfit == "shirt":
        pen.paint((trunk_shape(stout, 0.008, 0.10), colour))
        pen.fill(polygon((-0.055, -0.14), (0.055, -0.14), (0, -0.04)), lighter(colour, 0.75))
        for y in (0.02, 0.1, 0.18):
            pen.fill(ellipse(0, y, 0.014, 0.014, n=12), lighter(colour, 0.85))
    elif outfit == "sweater":
        pen.paint((trunk_shape(stout, 0.012, 0.12), colour))
        for y in (-0.035, 0.075, 0.185):
            half = (0.15 + max(0.0, min(y, 0.1)) * 0.35) * stout - (0.02 if y > 0.1 else 0.0)
            band = polygon(
                (-half, y),
                (0, y + 0.016),
                (half, y),
                (half, y + 0.05),
                (0, y + 0.066),
                (-half, y + 0.05),
            )
            pen.fill(band, lighter(colour, 0.75))
    elif outfit == "dress":
        skirt = smooth(
            (-0.12, -0.08),
            (0, -0.13),
            (0.12, -0.08),
            (0.18, 0.1),
            (0.31, 0.29),
            (0.16, 0.335),
            (0, 0.345),
            (-0.16, 0.335),
            (-0.31, 0.29),
            (-0.18, 0.1),
        )
        wide = stout * (0.68 if lying else 1.0)
        pen.paint((skirt * (wide, 1), colour))
        pen.stroke(
            curve((-0.26 * wide, 0.285), (0, 0.34), (0.26 * wide, 0.285)),
            0.016,
            lighter(colour, 0.7),
        )
        for x, y in ((-0.12, 0.16), (0.02, 0.22), (0.13, 0.14), (-0.02, 0.06)):
            pen.fill(ellipse(x, y, 0.02, 0.02, n=12), lighter(colour, 0.8))
    elif outfit == "overalls":
        _draw_overalls(pen, colour, stout)


def _draw_overalls(pen: Pen, colour: Colour, stout: float) -> None:
    w = HIP_RADIUS * stout + 0.008
    trousers = smooth(
        (-w * 0.93, 0.07),
        (0, 0.1),
        (w * 0.93, 0.07),
        (w, 0.2),
        (w * 0.95, 0.345),
        (0.035, 0.35),
        (0, 0.28),
        (-0.035, 0.35),
        (-w * 0.95, 0.345),
        (-w, 0.2),
    )
    bib = polygon((-0.095, -0.02), (0.095, -0.02), (0.115, 0.14), (-0.115, 0.14))
    straps = [ribbon(polygon((s * 0.085, 0.0), (s * 0.12, -0.12)), 0.022) for s in (-1, 1)]
    pen.paint(*[(strap, colour) for strap in straps], shade=0)
    pen.paint((trousers, colour), (bib, colour), shade=0.08)
    pen.fill(polygon((-0.055, 0.05), (0.055, 0.05), (0.045, 0.12), (-0.045, 0.12)), darker(colour, 0.2))
    for side in (-1, 1):
        pen.fill(ellipse(side * 0.08, 0.005, 0.02, 0.02, n=12), (255, 222, 110))


def draw_at_neck(pen: Pen, outfit: str, colour: Colour) -> None:
    """Draw what is worn around the neck (trunk pen, over the trunk, under the head)."""
    if outfit == "scarf":
        tail = smooth((0.09, -0.1), (0.16, -0.08), (0.21, 0.1), (0.11, 0.12))
        pen.paint((tail, darker(colour, 0.1)), shade=0)
        pen.stroke(polygon((0.117, 0.072), (0.195, 0.06)), 0.011, lighter(colour, 0.75))
        pen.paint((ribbon(curve((-0.16, -0.11), (0, -0.02), (0.16, -0.11)), 0.05), colour))
        for x in (-0.09, 0.0, 0.09):
            pen.stroke(polygon((x - 0.008, -0.115), (x + 0.008, -0.035)), 0.012, lighter(colour, 0.75))
    elif outfit == "cape":
        pen.paint((ribbon(curve((-0.14, -0.11), (0, -0.045), (0.14, -0.11)), 0.038), colour), shade=0)
        pen.paint((ellipse(0, -0.07, 0.03, 0.03, n=16), (255, 214, 90)), shade=0)


def draw_on_head(pen: Pen, outfit: str, colour: Colour, own_right: int) -> None:
    """Draw what is worn on the head (head pen, over face and ears)."""
    if outfit == "bow":
        bow = pen.child(own_right * 0.14, -0.22, own_right * 20)
        for side in (-1, 1):
            wing = smooth((0, 0), (side * 0.13, -0.085), (side * 0.155, 0.0), (side * 0.13, 0.085))
            bow.paint((wing, colour), shade=0.15)
        bow.paint((ellipse(0, 0, 0.045, 0.05, n=20), lighter(colour, 0.15)))
    elif outfit == "hat":
        hat = pen.child(-own_right * 0.02, -0.2, own_right * 6)
        crown = smooth(
            (-0.13, 0.02),
            (-0.135, -0.14),
            (-0.06, -0.2),
            (0.06, -0.2),
            (0.135, -0.14),
            (0.13, 0.02),
        )
        hat.paint((crown, colour))
        hat.fill(
            polygon((-0.14, -0.055), (0.14, -0.055), (0.138, 0.0), (-0.138, 0.0)),
            lighter(colour, 0.7),
        )
        hat.paint((ellipse(0, 0.015, 0.235, 0.05), colour))
        hat.fill(star(0.0, -0.118, 0.04), lighter(colour, 0.7))
