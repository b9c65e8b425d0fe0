"""A picture's truth in, the picture out."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor
from typing import Any

import numpy as np
from PIL import Image

from bunny_lora.world.attributes import Picture
from bunny_lora.world.characters import draw_character, draw_shadow
from bunny_lora.world.drawing import PLAIN, Canvas, Style
from bunny_lora.world.scenes import draw_foreground, draw_scene

Box = list[int]
_EDGE_PX = 0.5
_DEPTH_OF_FIELD = {"close-up": 0.016, "medium": 0.011, "wide": 0.007}
"""How soft the background gets, in picture heights: the eye goes to the characters."""


@dataclass(frozen=True)
class Rendering:
    """A drawn picture with its truth.

    `bodies` and `faces` hold one box `[x1, y1, x2, y2]` a character, in pixels of `image`, clipped
    to the frame, x2 and y2 exclusive; in the order of `picture.characters`. A body box bounds all
    that is drawn of a character but its shadow; a face box the skull without ears and hat.
    """

    image: Image.Image
    picture: Picture
    bodies: list[Box]
    faces: list[Box]

    def as_dict(self) -> dict[str, Any]:
        """Return the truth and the boxes, ready for JSON."""
        truth = self.picture.as_dict()
        for character, body, face in zip(truth["characters"], self.bodies, self.faces, strict=True):
            character |= {"body_box": body, "face_box": face}
        return truth | {"size": list(self.image.size)}


def render(picture: Picture, size: tuple[int, int] = (128, 128), style: Style = PLAIN) -> Rendering:
    """Draw `picture` at `size` (width, height) pixels.

    The picture is composed for its `aspect`; at a size of another aspect it is cut or widened at
    the right. The same picture and size give the same pixels. With characters in it the background
    is slightly out of focus; without, it is what the picture is about.
    """
    canvas = Canvas(size, style=style)
    _draw_background(canvas, picture)
    extents = []
    for character in picture.characters:
        draw_shadow(canvas, character)
        extents.append(draw_character(canvas, character, picture.scene.light))
    draw_foreground(canvas, picture.scene)
    return Rendering(
        image=canvas.finish(),
        picture=picture,
        bodies=[_box(extent.body, size) for extent in extents],
        faces=[_box(extent.face, size) for extent in extents],
    )


def render_scene(picture: Picture, size: tuple[int, int] = (128, 128)) -> Image.Image:
    """Draw the picture without its characters, the background as it is behind them."""
    canvas = Canvas(size)
    _draw_background(canvas, picture)
    draw_foreground(canvas, picture.scene)
    return canvas.finish()


def render_array(picture: Picture, size: tuple[int, int] = (128, 128)) -> np.ndarray:
    """Return the picture alone as uint8 (height, width, 3)."""
    return np.asarray(render(picture, size).image)


def _draw_background(canvas: Canvas, picture: Picture) -> None:
    draw_scene(canvas, picture.scene)
    if picture.characters:
        canvas.defocus(_DEPTH_OF_FIELD[picture.scene.camera])


def _box(extent: tuple[float, float, float, float], size: tuple[int, int]) -> Box:
    """Return whole pixels; a shape fills the fine pixels that its edge touches, hence the slack."""
    width, height = size
    x1, y1, x2, y2 = (value * height for value in extent)
    left, top = floor(x1 - _EDGE_PX), floor(y1 - _EDGE_PX)
    right, bottom = ceil(x2 + _EDGE_PX), ceil(y2 + _EDGE_PX)
    left, top = min(max(0, left), width - 1), min(max(0, top), height - 1)
    return [left, top, max(min(width, right), left + 1), max(min(height, bottom), top + 1)]
