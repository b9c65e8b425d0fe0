"""What all figures share: colours, type sizes, places in inches, pictures and shortened text.

Figures are drawn without pyplot, so there is no global state and nothing to close; in a notebook a
figure shows itself as the last expression of a cell.
"""

from __future__ import annotations

import io
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from bunny_lora.core import files
from bunny_lora.report import fonts

# Okabe and Ito's palette, told apart by colour-blind readers, https://jfly.uni-koeln.de/color/; orange
# is darker than theirs, so that text in it can be read on white.
BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#C04F00", "#009E73", "#737373", "#222222"
TITLE_PT, LABEL_PT, SMALL_PT = 12, 9, 8
DPI = 110
JPEG_QUALITY = 90
WIDTH_IN = 10.0
FILLER = "\ufdd0"  # no character of any text


class Plot(Figure):
    """A figure that notebooks show without pyplot, on white in a dark theme too."""

    def __init__(
        self, height_in: float, title: str, subtitle: str = "", *, width_in: float = WIDTH_IN
    ) -> None:
        super().__init__(figsize=(width_in, height_in), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self)
        self.titles = [title, subtitle]
        self.label(0.12, 0.12, title, size=TITLE_PT, weight="bold")
        self.label(0.12, 0.38, subtitle, size=LABEL_PT, color="#555555")

    def panel(self, left: float, top: float, width: float, height: float) -> Axes:
        """Return axes at a place in inches from the upper left corner."""
        wide, tall = self.get_figwidth(), self.get_figheight()
        place = (left / wide, 1 - (top + height) / tall, width / wide, height / tall)
        return self.add_axes(place)

    def label(self, left: float, top: float, text: str, **style: Any) -> None:
        """Write text at a place in inches from the upper left corner; "$" stays a dollar sign."""
        plain: dict[str, Any] = {"size": SMALL_PT, "color": INK, "ha": "left", "va": "top"}
        place = (left / self.get_figwidth(), 1 - top / self.get_figheight())
        self.text(*place, text, parse_math=False, **plain | style)

    def draw(self, renderer: Any) -> None:
        """Draw, with fonts that have the letters."""
        with fonts.any_script(self):
            super().draw(renderer)

    @property
    def alt_text(self) -> str:
        """What the figure shows, for those who cannot see it: titles, what is beside it, the axes."""
        beside = [text.get_text() for text in self.texts]
        named = [
            name
            for axes in self.axes
            for name in (axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel())
        ]
        said = [" ".join(text.split()) for text in (*self.titles, *beside, *named)]
        return ". ".join(dict.fromkeys(filter(None, said)))

    def as_png(self) -> bytes:
        """Return the figure as a PNG; not under IPython's name, or notebooks would keep both kinds."""
        return self._as("png")

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, bytes], dict[str, dict[str, str]]]:
        """Return the figure with its alternative text, as IPython asks for both.

        Pictures as JPEG, charts as PNG: an executed notebook that is all PNG has more than 5 MB.
        """
        kind = "jpeg" if any(axes.images for axes in self.axes) else "png"
        return {f"image/{kind}": self._as(kind)}, {f"image/{kind}": {"alt": self.alt_text}}

    def _as(self, kind: str) -> bytes:
        buffer = io.BytesIO()
        options = {"quality": JPEG_QUALITY} if kind == "jpeg" else {}
        self.savefig(buffer, format=kind, pil_kwargs=options)
        return buffer.getvalue()


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, atomically, and return its path."""
    with files.atomic_path(path) as part:
        figure.savefig(part, format="png")
    return path


def clean(axes: Axes, title: str = "", *, grid: Literal["x", "y"] | None = None) -> Axes:
    """Take away what carries nothing, and set the one type size of axes."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")
    axes.tick_params(labelsize=SMALL_PT, colors=INK, length=0)
    axes.set_title(title, size=LABEL_PT, loc="left", color=INK, parse_math=False)
    if grid:
        axes.grid(axis=grid, color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
    return axes


def show(axes: Axes, picture: Path | Image.Image) -> None:
    """Put a picture into axes, or a note where its file is missing or damaged."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#DDDDDD")
    try:
        image = _opened(picture) if isinstance(picture, Path) else picture
    except (OSError, SyntaxError):
        axes.text(0.5, 0.5, "no picture", size=SMALL_PT, color=GREY, ha="center", va="center")
        return
    axes.imshow(ImageOps.contain(image, (512, 512)))


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def wrap(text: str, width: int, n_lines: int) -> str:
    """Return text on at most `n_lines` lines of `width` letters, cut with an ellipsis.

    Chinese, Japanese and Korean letters and emoji count twice: they are as wide.
    """
    wide = "".join(c + FILLER * (unicodedata.east_asian_width(c) in "WF") for c in text)
    lines = textwrap.wrap(wide, width, max_lines=n_lines, placeholder=" …")
    return "\n".join(lines).replace(FILLER, "")


def cut(text: str, n: int) -> str:
    """Return at most `n` characters of a text."""
    return text if len(text) <= n else text[: n - 1] + "…"


def spread(items: Sequence[Any], n: int) -> list[Any]:
    """Return at most `n` items, evenly spaced, first and last among them."""
    if len(items) <= n:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, n - 1))] for i in range(n)]
