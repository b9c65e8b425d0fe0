"""Where the joints are: one rig a pose, in character coordinates.

The ground is y = 0, up is negative, the top of the skull of a standing character is at y = -1. Rigs
are drawn facing the viewer or turned to the right; whoever faces left is drawn mirrored. Pairs hold
the limb on the viewer's left first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bunny_lora.world.drawing import Point


@dataclass(frozen=True)
class Rig:
    """The joints of a body at one moment; `tilt` turns the head clockwise, in degrees."""

    chest: Point
    hip: Point
    head: Point
    hands: tuple[Point, Point]
    elbows: tuple[Point, Point]
    feet: tuple[Point, Point]
    tilt: float = 0.0
    lift: float = 0.0
    soles: bool = False


RIGS = {
    "standing": Rig(
        chest=(0, -0.42),
        hip=(0, -0.25),
        head=(0, -0.72),
        hands=((-0.25, -0.21), (0.25, -0.21)),
        elbows=((-0.25, -0.36), (0.25, -0.36)),
        feet=((-0.11, -0.045), (0.11, -0.045)),
    ),
    "sitting": Rig(
        chest=(0, -0.30),
        hip=(0, -0.15),
        head=(0, -0.59),
        hands=((-0.18, -0.10), (0.18, -0.10)),
        elbows=((-0.27, -0.22), (0.27, -0.22)),
        feet=((-0.24, -0.07), (0.24, -0.07)),
        soles=True,
    ),
    "running": Rig(
        chest=(0.05, -0.45),
        hip=(-0.04, -0.29),
        head=(0.15, -0.74),
        hands=((-0.26, -0.36), (0.31, -0.42)),
        elbows=((-0.20, -0.24), (0.27, -0.26)),
        feet=((-0.34, -0.16), (0.27, -0.06)),
        tilt=8,
        lift=0.04,
    ),
    "jumping": Rig(
        chest=(0, -0.43),
        hip=(0, -0.27),
        head=(0, -0.73),
        hands=((-0.37, -0.56), (0.37, -0.56)),
        elbows=((-0.28, -0.38), (0.28, -0.38)),
        feet=((-0.24, -0.10), (0.24, -0.10)),
        lift=0.22,
    ),
    "sleeping": Rig(
        chest=(0.08, -0.20),
        hip=(-0.16, -0.18),
        head=(0.32, -0.22),
        hands=((0.16, -0.05), (0.30, -0.05)),
        elbows=((0.10, -0.10), (0.20, -0.12)),
        feet=((-0.36, -0.05), (-0.24, -0.04)),
        tilt=14,
    ),
}
RIGS["waving"] = replace(
    RIGS["standing"],
    hands=((-0.25, -0.21), (0.44, -0.58)),
    elbows=((-0.25, -0.36), (0.38, -0.34)),
    tilt=-4,
)
RIGS["cheering"] = replace(
    RIGS["standing"],
    hands=((-0.41, -0.72), (0.41, -0.72)),
    elbows=((-0.40, -0.40), (0.40, -0.40)),
)

_BUILD = {"bunny": 1.0, "cat": 0.95, "bear": 1.18, "fox": 0.94, "mouse": 0.88}
"""How stout a body is."""


def build(species: str) -> float:
    """Return how stout the species is, 1 being the bunny."""
    return _BUILD[species]


def pose(name: str, *, turned: bool, rng: np.random.Generator) -> Rig:
    """Return the rig of a pose with small random freedoms; `turned` looks to the right."""
    rig = RIGS[name]
    wobble = rng.uniform(-0.025, 0.025, size=6)
    (left_x, left_y), (right_x, right_y) = rig.hands
    left = (left_x + float(wobble[0]), left_y + float(wobble[2]))
    right = (right_x + float(wobble[1]), right_y + float(wobble[3]))
    head = (rig.head[0] + float(wobble[4]) * 0.5, rig.head[1])
    if turned and name not in ("running", "sleeping"):
        head = (head[0] + 0.025, head[1])
    tilt = rig.tilt + float(rng.uniform(-5, 5)) * (name != "sleeping")
    return replace(rig, hands=(left, right), head=head, tilt=tilt)
