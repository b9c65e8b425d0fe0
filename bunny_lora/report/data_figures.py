"""The training data as figures and tables."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from PIL import ImageOps

from bunny_lora.config import Config
from bunny_lora.core import paths
from bunny_lora.core.files import is_file
from bunny_lora.data.images import open_rgb
from bunny_lora.data.summary import remarks
from bunny_lora.dataset import read_samples
from bunny_lora.prepare import find_weak_spots
from bunny_lora.report.plot import (
    BLUE,
    INK,
    ORANGE,
    SMALL_PT,
    WIDTH_IN,
    Plot,
    clean,
    cut,
    show,
    spread,
    wrap,
)

GAP_IN = 0.07
CAPTION_PT = 7
MAX_CHARACTERS = 12
HALO = [withStroke(linewidth=3, foreground="white")]  # against a background of the same colour
THUMBNAIL_PX = 160
TEXT_WIDTH = 110


def contact_sheet(data_dir: Path, n: int = 12, columns: int = 4) -> Figure:
    """Show `n` training frames, evenly spaced, with face boxes and the first words of the caption."""
    samples = read_samples(data_dir)
    chosen = spread(samples, n)
    cell, caption_in = (WIDTH_IN - 0.24) / columns - GAP_IN, 0.42
    row_in = cell * 9 / 16 + caption_in
    n_rows = -(-len(chosen) // columns)
    shown = f"{len(chosen)} of {len(samples)}, evenly spaced" if len(chosen) < len(samples) else "all"
    boxes = "; boxes: faces found by the analysis" if any(sample.faces for sample in samples) else ""
    figure = Plot(0.72 + n_rows * row_in, "Training frames", shown + boxes)
    for place, sample in enumerate(chosen):
        left = 0.12 + (place % columns) * (cell + GAP_IN)
        top = 0.68 + (place // columns) * row_in
        axes = figure.panel(left, top, cell, cell * 9 / 16)
        _frame(axes, sample.path, sample.faces)
        caption = wrap(sample.caption, 42, 2)
        figure.label(left, top + cell * 9 / 16 + 0.04, caption, size=CAPTION_PT)
    return figure


def _frame(axes: Axes, path: Path, faces: Sequence[Sequence[float]]) -> None:
    picture = open_rgb(path)
    small = ImageOps.contain(picture, (512, 512))
    show(axes, small)
    axes.spines[:].set_visible(False)
    scale = small.width / picture.width
    for x1, y1, x2, y2 in faces:
        size = ((x2 - x1) * scale, (y2 - y1) * scale)
        box = (x1 * scale - 0.5, y1 * scale - 0.5)
        axes.add_patch(Rectangle(box, *size, fill=False, color=ORANGE, lw=1.6, path_effects=HALO))


def characters_chart(summary: dict[str, Any]) -> Figure:
    """Show frames a character and, where they are known, confidence and caption lengths."""
    counts = sorted(summary["characters"].items(), key=lambda item: (-item[1], item[0]))
    shown = counts[:MAX_CHARACTERS]
    title = f"{summary['n_images']} of {summary['n_entries']} frames are usable"
    most = f"; most often {cut(counts[0][0], 24)} ({counts[0][1]})" if counts else ""
    named = _plural(len(counts), "character") if counts else "no character is named"
    rescued = f"{_plural(summary['n_rescued'], 'caption')} taken from the scene description"
    height = max(1.3, 0.32 * len(shown))
    figure = Plot(height + 1.45, title + most, f"{named}; {rescued}")
    if counts:
        some = f"the first {len(shown)} characters" if len(shown) < len(counts) else "each character"
        _bars(clean(figure.panel(1.2, 0.85, 2.3, height), f"Frames with {some}"), shown)
    left = 4.15 if counts else 0.75
    for title, unit, values, limit in _histograms(summary):
        axes = clean(figure.panel(left, 0.85, 2.35, height), title, grid="y")
        axes.hist(values, bins=20, range=(0, max([limit, *values])), color=BLUE)
        if limit > 1:
            axes.axvline(limit, color=ORANGE, linewidth=1.5)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.set_ylabel("frames", size=SMALL_PT)
        axes.set_xlabel(unit, size=SMALL_PT)
        left += 3.15
    return figure


def _bars(axes: Axes, counts: Sequence[tuple[str, int]]) -> None:
    bars = axes.barh(range(len(counts)), [n for _, n in counts], color=BLUE)
    axes.set_yticks(range(len(counts)), [cut(name, 16) for name, _ in counts], parse_math=False)
    axes.invert_yaxis()
    axes.bar_label(bars, padding=3, size=SMALL_PT, color=INK)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.margins(x=0.15)


def _histograms(summary: dict[str, Any]) -> Iterator[tuple[str, str, list[float], float]]:
    """Yield title, unit, values and their limit for what is known of the frames."""
    images, tokens = summary["images"], summary["caption_tokens"]
    if known := [image["confidence"] for image in images if image["confidence"] is not None]:
        yield "Confidence of the analysis", "0: none, 1: certain", known, 1
    if tokens is not None:
        title = f"Caption length: {tokens['n_truncated'] or 'none'} cut at {tokens['limit']}"
        yield title, "tokens", [image["caption_tokens"] for image in images], tokens["limit"]


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def dropped_text(summary: dict[str, Any]) -> str:
    """Return what was left out and why, as plain text: counts, every frame, and what else to know."""
    dropped = summary["dropped"]
    lines = [f"{summary['n_images']} of {summary['n_entries']} frames kept, {len(dropped)} left out"]
    by_reason = sorted(summary["dropped_by_reason"].items(), key=lambda item: (-item[1], item[0]))
    lines += [f"  {count:>4}  {reason}" for reason, count in by_reason]
    wide = max((len(str(item["frame_id"])) for item in dropped), default=0)
    lines += [f"        {item['frame_id']!s:<{wide}}  {item['reason']}" for item in dropped]
    lines += remarks(summary)
    return "\n".join(lines)


def weak_spots_text(config: Config) -> str:
    """Return what a run would learn badly of the prepared data, each with the key that answers it."""
    spots = find_weak_spots(config)
    if not spots:
        return "No weak spots found in these data"
    wide = max(len(spot.what) for spot in spots)
    lines = ["Weak spots of these data, and the key that answers each:"]
    for spot in spots:
        mark = "set already: " if spot.is_answered(config) else ""
        texts = (f"{spot.what:<{wide}}  {spot.who}", f"{'':<{wide}}  -> {mark}{spot.answer}")
        lines += [
            textwrap.fill(text, TEXT_WIDTH, initial_indent="  ", subsequent_indent=" " * (wide + 4))
            for text in texts
        ]
    return "\n".join(lines)


def dropped_table(summary: dict[str, Any], origin_dir: Path | None = None) -> str:
    """Return what was left out and why as an HTML table, with thumbnails of frames that exist.

    Args:
        summary: of the data.
        origin_dir: the folder of the source, or the one it lies in; relative paths of frames start at
            the project root, or for a source elsewhere at one of these.
    """
    if not summary["dropped"]:
        return "<p>No frame was left out.</p>"
    head = "".join(
        f'<th style="text-align:left">{name}</th>' for name in ("", "frame", "left out because")
    )
    rows = []
    for item in summary["dropped"]:
        cells = [
            _thumbnail(item.get("path"), origin_dir),
            *map(_escape, (item["frame_id"], item["reason"])),
        ]
        rows.append("".join(f'<td style="text-align:left">{cell}</td>' for cell in cells))
    body = "".join(f"<tr>{row}</tr>" for row in [head, *rows])
    return f"<table>{body}</table>"


def _escape(text: Any) -> str:
    return html.escape(str(text))


def _thumbnail(path: str | None, origin_dir: Path | None) -> str:
    folders = [paths.project_root(), *([origin_dir, *origin_dir.parents[:2]] if origin_dir else [])]
    places = [folder / (path or "") for folder in folders]
    try:
        picture = open_rgb(next(place for place in places if is_file(place)))
    except Exception:  # Pillow's decoders raise whatever they trip over, and these are the bad ones.
        return "<i>no picture</i>"
    small = ImageOps.contain(picture, (THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=75)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" width="{small.width}" src="data:image/jpeg;base64,{data}">'
