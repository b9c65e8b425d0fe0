"""Anti-aliased drawing: shapes as polygons, filled on a canvas that is several times too large.

A shape is an array of points (n, 2). A `Canvas` takes points in picture heights; a `Pen` is a local
coordinate system on a canvas (x right, y down) that remembers what was drawn with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

Points = np.ndarray
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Style:
    """How a film is drawn: width of outlines and size of heads over the usual, and its palette.

    `saturation` 0 is grey, 1 as ever, and `tint` the factor of each colour of the whole picture.
    """

    line: float = 1.0
    head: float = 1.0
    saturation: float = 1.0
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def develop(self, image: Image.Image) -> Image.Image:
        """Return a finished picture in this palette."""
        if self.saturation != 1.0:
            image = ImageEnhance.Color(image).enhance(self.saturation)
        if self.tint != (1.0, 1.0, 1.0):
            image = image.point([min(255, round(c * tint)) for tint in self.tint for c in range(256)])
        return image


PLAIN = Style()
STYLES = {
    "plain": PLAIN,
    "storybook": Style(line=2.2, head=1.16, saturation=0.62, tint=(1.02, 0.97, 0.86)),
    "neon": Style(line=0.55, head=0.9, saturation=1.4, tint=(0.9, 0.95, 1.12)),
}
"""The style that Bunny World's models know, and two that they never saw."""
Point = tuple[float, float]
_PIXEL_FILTER = 0.55  # finished pixels


@lru_cache(maxsize=4096)
def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Return the colour that is `share` of `second` and the rest of `first`."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))  # type: ignore[return-value]


def darker(colour: Colour, share: float = 0.45) -> Colour:
    """Return a deeper tone of the same hue, as for outlines."""
    return mix(colour, (46, 26, 48), share)


def lighter(colour: Colour, share: float = 0.35) -> Colour:
    """Return a paler tone of the same hue."""
    return mix(colour, (255, 252, 244), share)


@lru_cache(maxsize=4096)
def _tinted(colour: Colour, tint: tuple[float, float, float]) -> Colour:
    return tuple(round(c * t) for c, t in zip(colour, tint, strict=True))  # type: ignore[return-value]


@lru_cache(maxsize=8)
def _circle(n_points: int) -> Points:
    angles = np.linspace(0.0, 2 * np.pi, n_points, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _rotation(degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[cos, sin], [-sin, cos]])


def ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0, n: int = 32) -> Points:
    """Return an ellipse around (x, y), turned clockwise by `turn` degrees."""
    points = _circle(n) * (rx, ry)
    return (points @ _rotation(turn) if turn else points) + (x, y)


def polygon(*points: Point) -> Points:
    """Return straight-edged corners as a shape."""
    return np.array(points, dtype=float)


@lru_cache(maxsize=8)
def _spline_weights(n_steps: int) -> np.ndarray:
    t = np.linspace(0.0, 1.0, n_steps, endpoint=False)[:, None]
    powers = np.concatenate([t**0, t, t**2, t**3], axis=1)
    basis = np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]) / 2
    return powers @ basis


def smooth(*points: Point, n_steps: int = 6) -> Points:
    """Return the closed, rounded outline (Catmull-Rom) that runs through `points`."""
    knots = np.array(points, dtype=float)
    windows = np.stack([np.roll(knots, shift, axis=0) for shift in (1, 0, -1, -2)])
    return np.einsum("tk,kpd->ptd", _spline_weights(n_steps), windows).reshape(-1, 2)


def curve(start: Point, bend: Point, end: Point, n: int = 8) -> Points:
    """Return an open quadratic Bezier line, `bend` being its control point."""
    return _bezier_weights(n) @ np.array([start, bend, end])


@lru_cache(maxsize=16)
def _bezier_weights(n: int) -> np.ndarray:
    t = np.linspace(0.0, 1.0, n)
    return np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], axis=1)


def ribbon(line: Points, start_width: float, end_width: float | None = None) -> Points:
    """Return an open line (n, 2) made solid, with round ends; widths are half widths."""
    end_width = start_width if end_width is None else end_width
    along = np.empty_like(line)
    along[1:-1] = line[2:] - line[:-2]
    along[0], along[-1] = line[1] - line[0], line[-1] - line[-2]
    along /= np.maximum(np.hypot(along[:, :1], along[:, 1:]), 1e-9)
    side = np.stack([-along[:, 1], along[:, 0]], axis=1)
    width = (start_width + (end_width - start_width) * np.arange(len(line)) / (len(line) - 1))[:, None]
    end_cap = line[-1] + end_width * (_CAP @ np.stack([side[-1], along[-1]]))
    start_cap = line[0] - start_width * (_CAP @ np.stack([side[0], along[0]]))
    return np.concatenate([line + width * side, end_cap, (line - width * side)[::-1], start_cap])


_CAP = np.array([(np.cos(angle), np.sin(angle)) for angle in np.linspace(0, np.pi, 7)[1:-1]])


def taper(start: Point, start_radius: float, end: Point, end_radius: float) -> Points:
    """Return two circles joined by straight sides: a pear, or a capsule when the radii agree."""
    axis = np.arctan2(end[1] - start[1], end[0] - start[0])
    angles = np.linspace(np.pi / 2, 3 * np.pi / 2, 13) + axis
    first = np.stack([np.cos(angles), np.sin(angles)], axis=1) * start_radius + start
    second = -np.stack([np.cos(angles), np.sin(angles)], axis=1) * end_radius + end
    return np.concatenate([first, second])


def star(x: float, y: float, radius: float, n_tips: int = 5, depth: float = 0.48) -> Points:
    """Return a star with one tip upwards."""
    angles = np.arange(2 * n_tips) * np.pi / n_tips - np.pi / 2
    radii = np.where(np.arange(2 * n_tips) % 2 == 0, radius, radius * depth)
    return np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], axis=1)


def heart(x: float, y: float, radius: float) -> Points:
    """Return a heart, about twice `radius` wide."""
    t = (np.arange(24) + 0.5) * np.pi / 12
    across = 16 * np.sin(t) ** 3
    down = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    cleft = (np.abs(across) < 3) & (down < 0)  # shallow, so that an outline finds its way in
    down = np.where(cleft, -8.5, down)
    return np.stack([x + across * radius / 16, y + down * radius / 16], axis=1)


def crescent(x: float, y: float, radius: float) -> Points:
    """Return a moon that opens to the right."""
    outer = np.linspace(np.radians(40), np.radians(320), 18)
    inner = np.linspace(np.radians(305), np.radians(55), 14)
    arcs = [
        np.stack([x + radius * np.cos(outer), y + radius * np.sin(outer)], axis=1),
        np.stack([x + radius * (0.38 + 0.68 * np.cos(inner)), y + 0.78 * radius * np.sin(inner)], 1),
    ]
    return np.concatenate(arcs)


def bolt(x: float, y: float, radius: float) -> Points:
    """Return a flash of lightning."""
    corners = [(0.3, -1), (-0.75, 0.15), (-0.1, 0.15), (-0.35, 1), (0.75, -0.25), (0.1, -0.25)]
    return np.array(corners) * radius + (x, y)


def inflate(points: Points, distance: float) -> Points:
    """Return a closed shape grown by `distance` along its normals, whichever way round it runs."""
    around = np.concatenate([points[-1:], points, points[:1]])
    along = around[2:] - around[:-2]
    area = np.dot(points[:, 0], around[2:, 1]) - np.dot(points[:, 1], around[2:, 0])
    outward = along[:, ::-1] * (1.0, -1.0)
    length = np.maximum(np.hypot(along[:, :1], along[:, 1:]), 1e-9)
    return points + outward * ((distance if area > 0 else -distance) / length)


@lru_cache(maxsize=1)
def _soft_disc() -> Image.Image:
    grid = np.linspace(-1, 1, 96)
    distance = np.hypot(grid[:, None], grid[None, :])
    fade = np.clip(1 - distance, 0, 1)
    return Image.fromarray((255 * fade * fade * (3 - 2 * fade)).astype(np.uint8))


class Canvas:
    """A picture in the making; all lengths are in picture heights."""

    def __init__(
        self, size: tuple[int, int], oversampling: int | None = None, style: Style = PLAIN
    ) -> None:
        self.size, self.style = size, style
        self.oversampling = oversampling or (4 if max(size) <= 256 else 2)
        self.unit = size[1] * self.oversampling
        self.aspect = size[0] / size[1]
        large = (size[0] * self.oversampling, size[1] * self.oversampling)
        self.image = Image.new("RGB", large)
        self._ink = ImageDraw.Draw(self.image)
        self._wash = ImageDraw.Draw(self.image, "RGBA")

    @property
    def pixel(self) -> float:
        """The side of one finished pixel."""
        return 1.0 / self.size[1]

    def fill(self, points: Points, colour: Colour) -> None:
        """Fill a shape with an opaque colour."""
        self._ink.polygon((points * self.unit).ravel().tolist(), fill=colour)

    def wash(self, points: Points, colour: Colour, opacity: float) -> None:
        """Fill a shape with a colour that lets `1 - opacity` of the ground through."""
        fill = (*colour, round(255 * opacity))
        self._wash.polygon((points * self.unit).ravel().tolist(), fill=fill)

    def gradient(self, *stops: tuple[float, Colour]) -> None:
        """Fill the whole canvas with colours that blend from stop to stop, from top to bottom."""
        heights = np.linspace(0, 1, self.image.height)
        at = [stop for stop, _ in stops]
        bands = [np.interp(heights, at, [colour[i] for _, colour in stops]) for i in range(3)]
        column = np.stack(bands, axis=1).round().astype(np.uint8)[:, None]
        self.image.paste(Image.fromarray(column).resize(self.image.size, Image.Resampling.NEAREST))

    def glow(self, x: float, y: float, rx: float, ry: float, colour: Colour, power: float) -> None:
        """Lay a soft spot of colour over the picture: light, or a shadow when dark."""
        width, height = max(1, round(2 * rx * self.unit)), max(1, round(2 * ry * self.unit))
        mask = _soft_disc().resize((width, height), Image.Resampling.BILINEAR)
        mask = mask.point([round(level * power) for level in range(256)])
        self.image.paste(colour, (round((x - rx) * self.unit), round((y - ry) * self.unit)), mask)

    def defocus(self, radius: float) -> None:
        """Blur what has been drawn so far, with a Gaussian of standard deviation `radius`."""
        soft = self.image.reduce(self.oversampling)
        soft = soft.filter(ImageFilter.GaussianBlur(radius * self.size[1]))
        self.image.paste(soft.resize(self.image.size, Image.Resampling.BILINEAR))

    def finish(self) -> Image.Image:
        """Return the picture at its true size, through a Gaussian pixel filter as in film renderers."""
        sharp = self.image.reduce(self.oversampling)
        return self.style.develop(sharp.filter(ImageFilter.GaussianBlur(_PIXEL_FILTER)))


@dataclass
class Pen:
    """A place, a size and an angle on a canvas; draws in its own coordinates.

    `tint` multiplies every colour and `haze` is then mixed into it by `haze_share` (the light of
    the scene), `line` is the half width of outlines in local units, `traces` collects all filled
    shapes in canvas coordinates.
    """

    canvas: Canvas
    matrix: np.ndarray
    origin: np.ndarray
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    haze: Colour = (0, 0, 0)
    haze_share: float = 0.0
    line: float = 0.01
    traces: list[Points] = field(default_factory=list)

    @classmethod
    def at(cls, canvas: Canvas, x: float, y: float, scale: float, *, mirrored: bool = False) -> Pen:
        """Return a pen whose local (0, 0) is at (x, y), one local unit being `scale` heights."""
        matrix = np.diag([-scale if mirrored else scale, scale])
        return cls(canvas, matrix, np.array([x, y], dtype=float))

    def child(self, x: float, y: float, turn: float = 0.0, scale: float = 1.0) -> Pen:
        """Return a pen around local (x, y), turned clockwise by `turn` degrees."""
        matrix = scale * _rotation(turn) @ self.matrix
        return replace(self, matrix=matrix, origin=self.place(np.array([x, y])))

    def place(self, points: Points) -> Points:
        """Return local points in canvas coordinates."""
        return points @ self.matrix + self.origin

    def lit(self, colour: Colour) -> Colour:
        """Return a colour in the light of the scene."""
        return mix(_tinted(colour, self.tint), self.haze, self.haze_share)

    def fill(self, points: Points, colour: Colour) -> None:
        """Fill a shape, without outline."""
        placed = self.place(points)
        self.traces.append(placed)
        self.canvas.fill(placed, self.lit(colour))

    def wash(self, points: Points, colour: Colour, opacity: float) -> None:
        """Fill a shape half transparently, without outline."""
        self.canvas.wash(self.place(points), self.lit(colour), opacity)

    def stroke(self, line: Points, width: float, colour: Colour) -> None:
        """Draw an open line (n, 2) of half width `width`."""
        self.fill(ribbon(line, width), colour)

    def paint(self, *parts: tuple[Points, Colour], shade: float = 0.12) -> None:
        """Fill shapes as one body: a common outline around them, each with a shaded lower side."""
        for points, colour in parts:
            outline = self.place(inflate(points, self.line))
            self.traces.append(outline)
            self.canvas.fill(outline, self.lit(darker(colour)))
        for points, colour in parts:
            if not shade:
                self.fill(points, colour)
                continue
            self.fill(points, darker(colour, shade))
            centre = points.mean(axis=0)
            reach = np.abs(points - centre).max(axis=0)
            self.fill(centre + (points - centre) * 0.87 - reach * (0.05, 0.09), colour)
