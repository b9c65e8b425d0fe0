"""What pages are made of: templates, pictures and charts inside the page, and a limit to its size.

A page is one file that needs no network and no script. Whatever comes from a run's files is escaped by
the templates, and pictures are taken from the folders of the runs alone.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from PIL import Image, ImageDraw, ImageOps

from bunny_lora.core import files
from bunny_lora.core.eval_parts import Interval
from bunny_lora.data.images import open_rgb
from bunny_lora.errors import BunnyLoraError
from bunny_lora.report.plot import BLUE, GREEN, GREY, INK, ORANGE, Plot
from bunny_lora.report.scores import number

MAX_BYTES = 4_900_000  # mail servers take 5 MB nearly everywhere
SIDES_PX = (320, 256, 192, 144, 112, 80)  # tried in turn, until the page is small enough
JPEG_QUALITY = 84
# Colours of the figures, and the variables of the style sheet that stand for them in both themes.
THEMED = {
    INK: "ink",
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
    GREY: "grey",
    "#BBBBBB": "line",
    "#E6E6E6": "line",
    "#555555": "grey",
}


@dataclass(frozen=True)
class Picture:
    """One picture of a page: where it lies, what it shows in words, and what is written below it.

    Attributes:
        path: of the file; None where there is none, which `note` then explains.
        alt: for those who cannot see it.
        label: below the picture, a word or two.
        note: what is wrong with it; it stands in place of a missing picture, or below a stale one.
        boxes: drawn on it, (x1, y1, x2, y2) as shares of width and height.
    """

    path: Path | None
    alt: str
    label: str = ""
    note: str = ""
    boxes: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class Strip:
    """Pictures that belong together, under a title."""

    title: str
    pictures: Sequence[Picture]
    about: str = ""


@dataclass
class Embedder:
    """Puts pictures into the page.

    Attributes:
        folders: resolved; pictures elsewhere are not shown, whatever a file of a run says.
        side_px: the longer side that larger pictures are made smaller to.
        known: pictures that were encoded before, by path and boxes.
    """

    folders: Sequence[Path]
    side_px: int
    known: dict[tuple[Path, str], tuple[str, tuple[int, int]]] = field(default_factory=dict)

    def __call__(self, picture: Picture) -> Markup:
        """Return the picture as HTML, or a box that says why there is none."""
        if picture.path is None or not files.is_file(picture.path):
            return _no_picture(picture.note or "no picture", picture.alt)
        if not files.is_inside(picture.path, self.folders):
            return _no_picture("outside the run, not shown", picture.alt)
        key = (picture.path, str(picture.boxes))
        try:
            if key not in self.known:
                self.known[key] = self._encoded(picture)
        except Exception:  # Pillow's decoders raise whatever they trip over.
            return _no_picture("damaged picture", picture.alt)
        data, (width, height) = self.known[key]
        return Markup('<img alt="{}" width="{}" height="{}" src="data:image/jpeg;base64,{}">').format(
            picture.alt, width, height, data
        )

    def _encoded(self, picture: Picture) -> tuple[str, tuple[int, int]]:
        assert picture.path is not None
        image = open_rgb(picture.path)
        if max(image.size) > self.side_px:
            image = ImageOps.contain(image, (self.side_px, self.side_px), Image.Resampling.LANCZOS)
        _draw_boxes(image, picture.boxes)
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=JPEG_QUALITY, optimize=True)
        return base64.b64encode(buffer.getvalue()).decode(), image.size


def _no_picture(why: str, alt: str) -> Markup:
    return Markup('<span class="gone" role="img" aria-label="{}: {}">{}</span>').format(alt, why, why)


def _draw_boxes(image: Image.Image, boxes: Sequence[Sequence[float]]) -> None:
    draw = ImageDraw.Draw(image)
    for x1, y1, x2, y2 in boxes:
        place = [x1 * image.width, y1 * image.height, x2 * image.width, y2 * image.height]
        place[2:] = [max(place[0], place[2]), max(place[1], place[3])]
        draw.rectangle(place, outline="white", width=3)
        draw.rectangle(place, outline=ORANGE, width=1)


def svg(figure: Plot) -> Markup:
    """Return a figure without its titles as SVG inside the page, in the colours of its theme."""
    alt = figure.alt_text
    for text in list(figure.texts):  # the page says its titles in its own type
        text.remove()
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    drawn = buffer.getvalue()
    for colour, name in THEMED.items():
        drawn = drawn.replace(colour.lower(), f"var(--{name})")
    head = Markup('<svg role="img" aria-label="{}" ').format(alt)
    return head + Markup(drawn[drawn.index("<svg ") + 5 :])


def interval_bar(
    value: Interval | None, ends: tuple[float, float], other: Interval | None = None
) -> Markup:
    """Return a small dot with its whiskers on a scale; with a grey one to compare with.

    The numbers stand beside it, so it says nothing to a screen reader.
    """
    marks = [
        _whisker(found, ends, kind)
        for found, kind in ((other, "other"), (value, "own"))
        if found is not None
    ]
    zero = ""
    if ends[0] < 0 < ends[1]:
        zero = Markup('<i class="zero" style="left:{}%"></i>').format(_place(0, ends))
    return Markup('<span class="bar" aria-hidden="true">{}{}</span>').format(
        zero, Markup("").join(marks)
    )


def _whisker(value: Interval, ends: tuple[float, float], kind: str) -> Markup:
    low, high = (_place(value.mean if x is None else x, ends) for x in (value.low, value.high))
    mean = _place(value.mean, ends)
    return Markup(
        '<i class="{} span" style="left:{}%;width:{}%"></i><i class="{} dot" style="left:{}%"></i>'
    ).format(kind, low, round(high - low, 1), kind, mean)


def _place(x: float, ends: tuple[float, float]) -> float:
    share = (x - ends[0]) / ((ends[1] - ends[0]) or 1)
    return round(100 * min(1.0, max(0.0, share)), 1)


def ends_of(values: Sequence[Interval | None], always: Sequence[float] = ()) -> tuple[float, float]:
    """Return the ends of a scale that has room for all these intervals."""
    places = [
        x
        for value in values
        if value is not None
        for x in (value.mean, value.low, value.high)
        if x is not None
    ]
    places += list(always)
    low, high = min(places, default=0.0), max(places, default=1.0)
    room = 0.04 * (high - low) or 0.5
    return low - room, high + room


def spread_of(value: Interval | None) -> str:
    """Return an interval's ends as text, empty where it has none."""
    if value is None or value.low is None or value.high is None:
        return ""
    return f"{number(value.low)} to {number(value.high)}"


def share(value: float | None) -> str:
    """Return a share as percents, "-" for none."""
    return "-" if value is None else f"{value:.0%}"


def shade(value: float | None) -> int:
    """Return how strongly a cell of a table is coloured, in percents, so that its text can be read."""
    return 0 if value is None else round(55 * min(1.0, max(0.0, value)))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("bunny_lora.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "spread": spread_of, "share": share, "shade": shade}
    environment.globals |= {"svg": svg, "interval_bar": interval_bar}
    return environment


def write_page(path: Path, template: str, folders: Sequence[Path], **content: Any) -> Path:
    """Write a page, with its pictures so small that the page stays below `MAX_BYTES`.

    Args:
        path: of the file.
        template: its name below `templates/`.
        folders: that pictures may come from.
        **content: what the template shows.

    Raises:
        BunnyLoraError: it is too large even with the smallest pictures, or it cannot be written.
    """
    files.write_text(path, page_text(template, folders, **content))
    return path


def page_text(template: str, folders: Sequence[Path], **content: Any) -> str:
    """Return a page, see `write_page`.

    Raises:
        BunnyLoraError: it is too large even with the smallest pictures.
    """
    inside = [folder.resolve() for folder in folders]
    found = _environment().get_template(template)
    for side in SIDES_PX:
        embed = Embedder(inside, side)
        text = found.render(picture=embed, side_px=side, is_reduced=side < SIDES_PX[0], **content)
        if len(text.encode()) <= MAX_BYTES:
            return text
    raise BunnyLoraError(
        f"The page would be larger than {MAX_BYTES / 1e6:.1f} MB with pictures of {SIDES_PX[-1]} px:"
        " name fewer runs, or shorter evaluation.prompts."
    )
