"""Things that stand in scenes, each drawn by a pen whose (0, 0) is where it meets the ground.

One local unit is a picture height in a wide shot; y runs down, so things stand in negative y.
"""

from __future__ import annotations

import numpy as np

from bunny_lora.world.drawing import (
    Colour,
    Pen,
    curve,
    darker,
    ellipse,
    lighter,
    mix,
    polygon,
    ribbon,
    smooth,
    star,
)

Rng = np.random.Generator


def round_tree(pen: Pen, leaves: Colour, bark: Colour = (132, 88, 62)) -> None:
    """Draw a leafy tree, 0.62 high."""
    pen.paint((ribbon(curve((0.01, 0.01), (-0.01, -0.15), (0, -0.3), 4), 0.036, 0.024), bark), shade=0)
    balls = ((-0.1, -0.32, 0.11), (0.11, -0.34, 0.11), (0, -0.48, 0.13), (0, -0.34, 0.12))
    pen.paint(*[(ellipse(x, y, r, r * 0.92, n=22), leaves) for x, y, r in balls], shade=0)
    for x, y, r in balls[:3]:
        pen.fill(ellipse(x - 0.02, y - 0.03, r * 0.62, r * 0.5, n=18), lighter(leaves, 0.16))


def fir_tree(pen: Pen, leaves: Colour, snow: Colour | None = None) -> None:
    """Draw a fir, 0.62 high, with snow on it if a colour is given."""
    pen.fill(polygon((-0.025, 0.01), (0.025, 0.01), (0.02, -0.1), (-0.02, -0.1)), (112, 76, 58))
    for base, top, half in ((-0.06, -0.3, 0.16), (-0.2, -0.44, 0.13), (-0.36, -0.62, 0.095)):
        tier = polygon(
            (-half, base),
            (-half * 0.4, base + 0.02),
            (0, base + 0.012),
            (half * 0.4, base + 0.02),
            (half, base),
            (0, top),
        )
        pen.paint((tier, leaves), shade=0.1)
        if snow:
            cap = polygon(
                (-half * 0.55, base + (top - base) * 0.42),
                (-half * 0.1, base + (top - base) * 0.34),
                (half * 0.25, base + (top - base) * 0.46),
                (half * 0.42, base + (top - base) * 0.58),
                (0, top),
            )
            pen.fill(cap, snow)


def palm(pen: Pen) -> None:
    """Draw a leaning palm, 0.62 high."""
    trunk = curve((0.0, 0.02), (0.03, -0.3), (0.12, -0.5), 8)
    pen.paint((ribbon(trunk, 0.03, 0.018), (176, 126, 80)), shade=0)
    for x, y in trunk[1:-1]:
        pen.stroke(polygon((x - 0.02, y), (x + 0.02, y - 0.008)), 0.004, (132, 90, 60))
    for dx, dy in (
        (-0.25, 0.05),
        (-0.2, -0.11),
        (-0.02, -0.16),
        (0.17, -0.1),
        (0.24, 0.06),
        (0.1, 0.1),
    ):
        leaf = smooth(
            (0.12, -0.5),
            (0.12 + dx * 0.5, -0.555 + dy * 0.6),
            (0.12 + dx, -0.5 + dy),
            (0.12 + dx * 0.45, -0.50 + dy * 0.5),
        )
        pen.paint((leaf, (72, 164, 84)), shade=0)


def flower(pen: Pen, petals: Colour) -> None:
    """Draw a five-petalled flower, 0.1 high."""
    pen.stroke(polygon((0, 0), (0.004, -0.07)), 0.006, (70, 140, 66))
    for angle in range(5):
        x, y = np.cos(angle * 1.2566 - 1.57), np.sin(angle * 1.2566 - 1.57)
        pen.fill(ellipse(0.022 * x, -0.08 + 0.022 * y, 0.018, 0.018, n=10), petals)
    pen.fill(ellipse(0, -0.08, 0.013, 0.013, n=10), (255, 214, 74))


def mushroom(pen: Pen) -> None:
    """Draw a toadstool, 0.11 high."""
    pen.paint(
        (polygon((-0.018, 0), (0.018, 0), (0.013, -0.06), (-0.013, -0.06)), (250, 238, 216)),
        shade=0,
    )
    cap = smooth((-0.06, -0.045), (-0.04, -0.09), (0, -0.11), (0.04, -0.09), (0.06, -0.045), (0, -0.04))
    pen.paint((cap, (222, 64, 60)), shade=0.1)
    for x, y in ((-0.025, -0.07), (0.02, -0.085), (0.03, -0.058)):
        pen.fill(ellipse(x, y, 0.011, 0.009, n=10), (255, 250, 240))


def fern(pen: Pen, colour: Colour) -> None:
    """Draw a tuft of long leaves, 0.15 high."""
    for lean in (-0.11, -0.055, 0.0, 0.06, 0.11):
        tip = (lean, -0.15 + abs(lean) * 0.7)
        pen.fill(ribbon(curve((0, 0), (lean * 0.2, tip[1]), tip, 5), 0.014, 0.002), colour)


def log(pen: Pen) -> None:
    """Draw a lying trunk, 0.26 long."""
    pen.paint((ribbon(polygon((-0.12, -0.045), (0.12, -0.045)), 0.045), (140, 96, 68)), shade=0.12)
    pen.paint((ellipse(0.13, -0.045, 0.03, 0.045, n=20), (222, 184, 136)), shade=0)
    pen.fill(ellipse(0.13, -0.045, 0.014, 0.022, n=14), (182, 138, 96))


def fence(pen: Pen, length: float) -> None:
    """Draw a white fence from x = 0 to `length`."""
    white = (250, 244, 232)
    for y in (-0.1, -0.05):
        pen.paint((polygon((0, y), (length, y), (length, y + 0.018), (0, y + 0.018)), white), shade=0)
    for x in np.arange(0.03, length, 0.085):
        post = polygon(
            (x - 0.016, 0.01),
            (x - 0.016, -0.12),
            (x, -0.145),
            (x + 0.016, -0.12),
            (x + 0.016, 0.01),
        )
        pen.paint((post, white), shade=0)


def butterfly(pen: Pen, colour: Colour) -> None:
    """Draw a butterfly around (0, 0), 0.07 wide."""
    for side in (-1, 1):
        pen.paint((ellipse(side * 0.02, -0.012, 0.02, 0.022, side * 25, n=14), colour), shade=0)
        pen.paint((ellipse(side * 0.016, 0.014, 0.014, 0.014, n=12), colour), shade=0)
    pen.stroke(polygon((0, -0.02), (0, 0.02)), 0.005, (60, 44, 56))


def cactus(pen: Pen) -> None:
    """Draw a two-armed cactus, 0.36 high."""
    green = (84, 156, 92)
    arms = [
        ribbon(curve((side * 0.02, y), (side * 0.12, y + 0.01), (side * 0.115, y - 0.1), 7), 0.028)
        for side, y in ((-1, -0.13), (1, -0.19))
    ]
    trunk = ribbon(polygon((0, 0), (0, -0.16), (0, -0.32)), 0.045)
    pen.paint(*[(arm, green) for arm in arms], (trunk, green), shade=0.1)
    for x in (-0.015, 0.015):
        pen.stroke(polygon((x, -0.02), (x, -0.32)), 0.004, darker(green, 0.3))
    pen.fill(ellipse(0.0, -0.372, 0.024, 0.018, n=12), (246, 120, 150))


def rock(pen: Pen, colour: Colour) -> None:
    """Draw a boulder, 0.12 high."""
    shape = smooth((-0.12, 0.01), (-0.1, -0.07), (-0.02, -0.12), (0.08, -0.09), (0.12, 0.01), (0, 0.02))
    pen.paint((shape, colour), shade=0.15)


def pyramid(pen: Pen) -> None:
    """Draw a pyramid, 0.3 high, lit from the left."""
    pen.fill(polygon((-0.3, 0.01), (0, -0.3), (0.3, 0.01)), (226, 180, 112))
    pen.fill(polygon((0.08, 0.01), (0, -0.3), (0.3, 0.01)), (196, 146, 90))


def umbrella(pen: Pen, colour: Colour) -> None:
    """Draw a beach umbrella, 0.46 high."""
    pen.stroke(polygon((0, 0.01), (-0.04, -0.42)), 0.008, (240, 234, 220))
    top = pen.child(-0.04, -0.36, -6)
    dome = smooth(
        (-0.24, 0.03),
        (-0.2, -0.06),
        (0, -0.13),
        (0.2, -0.06),
        (0.24, 0.03),
        (0.12, 0.0),
        (0, 0.025),
        (-0.12, 0.0),
    )
    top.paint((dome, colour), shade=0)
    for side in (-1, 1):
        stripe = smooth((0, -0.125), (side * 0.12, -0.09), (side * 0.2, 0.01), (side * 0.12, 0.0))
        top.fill(stripe, (255, 250, 240))


def sailboat(pen: Pen, colour: Colour) -> None:
    """Draw a boat, 0.2 high."""
    pen.fill(polygon((-0.005, -0.03), (-0.005, -0.2), (0.1, -0.05)), (255, 250, 240))
    pen.fill(polygon((-0.015, -0.04), (-0.015, -0.17), (-0.075, -0.05)), colour)
    pen.fill(polygon((-0.09, -0.035), (0.11, -0.035), (0.07, 0.008), (-0.06, 0.008)), (150, 92, 66))


def snowman(pen: Pen) -> None:
    """Draw a snowman, 0.4 high."""
    white = (250, 252, 255)
    for y, radius in ((-0.09, 0.105), (-0.22, 0.08), (-0.325, 0.06)):
        pen.paint((ellipse(0, y, radius, radius, n=26), white), shade=0.1)
    pen.stroke(polygon((-0.06, -0.265), (0.06, -0.265)), 0.014, (222, 70, 66))
    for x, y in ((-0.022, -0.34), (0.022, -0.34), (0, -0.22), (0, -0.18)):
        pen.fill(ellipse(x, y, 0.009, 0.009, n=10), (52, 44, 60))
    pen.fill(polygon((0, -0.33), (0, -0.31), (0.05, -0.316)), (244, 144, 52))
    pen.fill(polygon((-0.05, -0.372), (0.05, -0.372), (0.05, -0.384), (-0.05, -0.384)), (60, 52, 70))
    pen.fill(polygon((-0.032, -0.38), (0.032, -0.38), (0.032, -0.44), (-0.032, -0.44)), (60, 52, 70))


def cabin(pen: Pen, *, lamps: bool) -> None:
    """Draw a log cabin, 0.3 high; `lamps` lights its window."""
    pen.paint(
        (polygon((-0.17, 0.01), (-0.17, -0.16), (0.17, -0.16), (0.17, 0.01)), (150, 98, 66)),
        shade=0,
    )
    pen.paint((polygon((-0.22, -0.15), (0, -0.31), (0.22, -0.15)), (248, 250, 255)), shade=0)
    pen.fill(
        polygon((-0.11, -0.05), (-0.11, -0.11), (-0.03, -0.11), (-0.03, -0.05)),
        (255, 218, 110) if lamps else (170, 214, 240),
    )
    pen.fill(polygon((0.04, 0.01), (0.04, -0.11), (0.11, -0.11), (0.11, 0.01)), (108, 66, 50))


def house_block(pen: Pen, rng: Rng, width: float, height: float, wall: Colour) -> None:
    """Draw a town house of the given size with lit windows."""
    pen.fill(polygon((0, 0.02), (0, -height), (width, -height), (width, 0.02)), wall)
    pen.fill(
        polygon(
            (-0.008, -height),
            (width + 0.008, -height),
            (width + 0.008, -height - 0.014),
            (-0.008, -height - 0.014),
        ),
        darker(wall, 0.35),
    )
    for y in np.arange(-height + 0.03, -0.04, 0.075):
        for x in np.arange(0.025, width - 0.03, 0.06):
            glass = (255, 216, 110) if rng.random() < 0.55 else darker(wall, 0.4)
            pen.fill(polygon((x, y), (x + 0.03, y), (x + 0.03, y + 0.04), (x, y + 0.04)), glass)


def street_lamp(pen: Pen) -> None:
    """Draw a street lamp, 0.5 high, with its light."""
    pen.fill(polygon((-0.01, 0), (0.01, 0), (0.006, -0.46), (-0.006, -0.46)), (54, 50, 70))
    centre = pen.place(np.array([0.0, -0.49]))
    reach = abs(pen.matrix[1, 1]) * 0.2
    pen.canvas.glow(float(centre[0]), float(centre[1]), reach, reach, (255, 226, 140), 0.75)
    pen.fill(ellipse(0, -0.49, 0.032, 0.036, n=18), (255, 240, 190))


def billboard(pen: Pen, colour: Colour) -> None:
    """Draw a sign on two posts with a star on it, 0.44 high."""
    for x in (-0.09, 0.09):
        pen.fill(
            polygon((x - 0.008, 0), (x + 0.008, 0), (x + 0.008, -0.25), (x - 0.008, -0.25)),
            (60, 56, 78),
        )
    pen.paint((polygon((-0.17, -0.22), (0.17, -0.22), (0.17, -0.42), (-0.17, -0.42)), colour), shade=0)
    pen.fill(star(0, -0.315, 0.075), lighter(colour, 0.8))


def book_row(pen: Pen, rng: Rng, length: float) -> None:
    """Draw books on a shelf from x = 0 to `length`, 0.12 high."""
    colours = ((222, 62, 62), (64, 112, 214), (250, 206, 56), (70, 160, 84), (142, 84, 190))
    x = 0.0
    while x < length - 0.02:
        width, height = rng.uniform(0.018, 0.032), rng.uniform(0.08, 0.12)
        colour = colours[int(rng.integers(len(colours)))]
        pen.fill(
            polygon((x, 0), (x, -height), (x + width, -height), (x + width, 0)),
            mix(colour, (250, 240, 220), 0.15),
        )
        x += width + 0.004
    pen.fill(polygon((-0.02, 0), (length, 0), (length, 0.016), (-0.02, 0.016)), (166, 112, 74))


def potted_plant(pen: Pen) -> None:
    """Draw a plant in a pot, 0.32 high."""
    fern(pen.child(0, -0.1, scale=1.5), (78, 160, 88))
    pen.paint(
        (polygon((-0.06, -0.11), (0.06, -0.11), (0.045, 0), (-0.045, 0)), (214, 116, 78)), shade=0.1
    )


def balloons(pen: Pen) -> None:
    """Draw three balloons on strings, 0.5 high."""
    for x, y, colour in (
        (-0.07, -0.36, (222, 62, 62)),
        (0.07, -0.38, (64, 112, 214)),
        (0, -0.45, (250, 206, 56)),
    ):
        pen.stroke(curve((0, 0), (x * 0.2, y * 0.5), (x, y), 5), 0.003, (120, 110, 120))
        pen.paint((ellipse(x, y, 0.055, 0.066, n=22), colour), shade=0)
        pen.fill(ellipse(x - 0.018, y - 0.022, 0.014, 0.02, n=10), lighter(colour, 0.6))
