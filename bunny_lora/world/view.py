"""How a scene is looked at: layers by depth, the light on them, and free places for things."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bunny_lora.world import palette
from bunny_lora.world.attributes import Scene
from bunny_lora.world.drawing import Canvas, Colour, Pen, Points

_ZOOM = {"close-up": 1.75, "medium": 1.3, "wide": 1.0}
_TINT = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.82, 0.74), "night": (0.52, 0.60, 0.84)}


@dataclass
class View:
    """A scene being drawn: canvas, light and the layer pens that place things by depth."""

    canvas: Canvas
    scene: Scene
    rng: np.random.Generator

    @property
    def night(self) -> bool:
        """Whether the lamps are on."""
        return self.scene.light == "night"

    @property
    def horizon(self) -> Colour:
        """The colour that far things fade into."""
        return palette.SKY[self.scene.light][2]

    def layer(self, depth: float) -> Pen:
        """Return the pen of a layer; depth 0 is the sky, 1 the ground at the characters' feet."""
        zoom = _ZOOM[self.scene.camera] ** (0.4 + 0.6 * depth)
        centre = np.array([self.canvas.aspect / 2, 0.66])
        pen = Pen.at(self.canvas, centre[0] * (1 - zoom), centre[1] * (1 - zoom), zoom)
        pen.tint = _TINT[self.scene.light]
        pen.line = 0.006
        if self.night:
            pen.haze, pen.haze_share = (34, 48, 140), 0.33
        return pen

    def spot(self, pen: Pen, x: float, y: float, scale: float = 1.0) -> Pen:
        """Return a pen for a thing that stands at (x, y) of a layer."""
        thing = pen.child(x, y, scale=scale)
        thing.line = 0.007
        return thing

    def xs(self, n: int, margin: float = 0.0) -> np.ndarray:
        """Return `n` x positions, spread over the width without clumps."""
        slots = (np.arange(n) + self.rng.uniform(0.15, 0.85, n)) / n
        return -margin + slots * (self.canvas.aspect + 2 * margin)

    def sides(self, n: int) -> list[float]:
        """Return `n` x positions towards the left and right edges, the middle kept free."""
        reach = self.canvas.aspect / 2
        first = 1 if self.rng.random() < 0.5 else -1
        return [
            float(reach + first * (-1) ** i * reach * self.rng.uniform(0.62, 0.95)) for i in range(n)
        ]

    def has(self, detail: str) -> bool:
        """Return whether the scene shows that detail."""
        return detail in self.scene.details


def band(y: float, height: float, phase: float, aspect: float, waves: float = 2.0) -> Points:
    """Return ground below a rolling line around `y`, reaching below the picture."""
    x = np.linspace(-0.6, aspect + 0.6, 30)
    line = y - height * np.sin(x * waves + phase)
    edge = np.stack([x, line], axis=1)
    return np.concatenate([edge, [(aspect + 0.6, 1.6), (-0.6, 1.6)]])
