"""Run files to figures and tables. Nothing here is computed that a file does not say.

Here: the data and the training. `grids` and `scores` show the pictures and the judgement; everything
that notebooks and the command line call is a name of this module.
"""

from __future__ import annotations

import base64
import html
import io
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from PIL import ImageOps

from bunny_lora.config import load_config
from bunny_lora.core import paths
from bunny_lora.core.files import is_file
from bunny_lora.data.images import open_rgb
from bunny_lora.dataset import ImageDataset, known_images
from bunny_lora.errors import BunnyLoraError
from bunny_lora.figures import (
    BLUE,
    INK,
    LABEL_PT,
    ORANGE,
    SMALL_PT,
    WIDTH_IN,
    Plot,
    clean,
    cut,
    save_figure,
    show,
    spread,
    wrap,
)
from bunny_lora.grids import before_after_grid, checkpoint_grid, samples_grid
from bunny_lora.scores import read_result, scores_chart, scores_table
from bunny_lora.training.log import LOG, TIMING, read_lines

__all__ = [
    "before_after_grid",
    "characters_chart",
    "checkpoint_grid",
    "contact_sheet",
    "dropped_table",
    "dropped_text",
    "loss_curve",
    "read_log",
    "read_result",
    "run_summary",
    "samples_grid",
    "save_figure",
    "scores_chart",
    "scores_table",
]

GAP_IN = 0.07
CAPTION_PT = 7
MAX_CHARACTERS = 12
HALO = [withStroke(linewidth=3, foreground="white")]  # against a background of the same colour
THUMBNAIL_PX = 160


# ---------------------------------------------------------------------------- the data


def contact_sheet(data_dir: Path, n: int = 12, columns: int = 4) -> Figure:
    """Show `n` training frames, evenly spaced, with face boxes and the first words of the caption."""
    frames = ImageDataset(data_dir, resolution=64, center_crop=False, instance_prompt="(no caption)")
    faces = {image["file_name"]: image["faces"] for image in known_images(data_dir)}
    chosen = spread(range(len(frames)), n)
    cell, caption_in = (WIDTH_IN - 0.24) / columns - GAP_IN, 0.42
    row_in = cell * 9 / 16 + caption_in
    n_rows = -(-len(chosen) // columns)
    shown = f"{len(chosen)} of {len(frames)}, evenly spaced" if len(chosen) < len(frames) else "all"
    boxes = "; boxes: faces found by the analysis" if any(faces.values()) else ""
    figure = Plot(0.72 + n_rows * row_in, "Training frames", shown + boxes)
    for place, index in enumerate(chosen):
        left = 0.12 + (place % columns) * (cell + GAP_IN)
        top = 0.68 + (place // columns) * row_in
        axes = figure.panel(left, top, cell, cell * 9 / 16)
        _frame(axes, frames.paths[index], faces.get(frames.file_names[index], []))
        caption = wrap(frames.captions[index], 42, 2)
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
    """Return what was left out and why, as plain text: counts, then every frame."""
    dropped = summary["dropped"]
    lines = [f"{summary['n_images']} of {summary['n_entries']} frames kept, {len(dropped)} left out"]
    by_reason = sorted(summary["dropped_by_reason"].items(), key=lambda item: (-item[1], item[0]))
    lines += [f"  {count:>4}  {reason}" for reason, count in by_reason]
    wide = max((len(str(item["frame_id"])) for item in dropped), default=0)
    lines += [f"        {item['frame_id']!s:<{wide}}  {item['reason']}" for item in dropped]
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


# ---------------------------------------------------------------------------- the training


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """Return one record a step, with its times; of a step logged twice the later one.

    Raises:
        BunnyLoraError: the run has no log, or nothing in it.
    """
    records: dict[int, dict[str, Any]] = {}
    for name in (LOG, TIMING):
        for record in read_lines(run_dir / name):
            records[record["step"]] = records.get(record["step"], {}) | record
    log = [records[step] for step in sorted(records) if "loss" in records[step]]
    if not log:
        raise BunnyLoraError(f"No training steps in {run_dir / LOG}: train first.")
    for record in log:
        if record["loss"] is None:  # A step that was skipped, for its loss was not finite.
            record["loss"] = math.nan
    return log


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return the running mean of the last `window` values, of fewer at the beginning."""
    tails = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(tail) / len(tail) for tail in tails]


def loss_curve(run_dir: Path) -> Figure:
    """Show the loss of every step, its running mean, and the learning rate on a second axis."""
    log = [record for record in read_log(run_dir) if math.isfinite(record["loss"])] or read_log(run_dir)
    steps, losses = [r["step"] for r in log], [r["loss"] for r in log]
    window = max(1, len(log) // 10)
    part = max(1, len(log) // 5)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    title = f"Loss {first:.4f} over the first {part} steps, {last:.4f} over the last {part}"
    if part == 1:
        title = f"Loss {first:.4f} at the first step, {last:.4f} at step {steps[-1]}"
    note = "The loss of one step mostly shows how hard its noise levels are: judge by the pictures."
    figure = Plot(3.65, title, note)
    axes = clean(figure.panel(0.75, 0.85, 8.4, 2.3), grid="y")
    marker = "o" if len(log) < 30 else None
    alpha = 1 if window == 1 else 0.3
    axes.plot(steps, losses, color=BLUE, alpha=alpha, lw=1, marker=marker, ms=4, label="one step")
    if window > 1:
        label = f"mean of the last {window} steps"
        axes.plot(steps, smoothed(losses, window), color=BLUE, linewidth=2, label=label)
    axes.set_xlabel(f"optimiser step ({log[-1]['n_images']} images each)", size=LABEL_PT)
    axes.set_ylabel("loss", size=LABEL_PT, color=BLUE)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    rate = axes.twinx()
    clean(rate)
    rate.plot(steps, [r["learning_rate"] for r in log], color=ORANGE, ls="--", lw=1)
    rate.set_ylabel("learning rate", size=LABEL_PT, color=ORANGE)
    rate.set_ylim(0, 1.15 * max(r["learning_rate"] for r in log) or 1)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.yaxis.get_offset_text().set_fontsize(SMALL_PT)
    axes.legend(
        frameon=False,
        fontsize=SMALL_PT,
        loc="lower left",
        ncols=2,
        bbox_to_anchor=(0, 1),
        borderaxespad=0,
    )
    return figure


def run_summary(run_dir: Path) -> str:
    """Return a few lines about a finished or broken-off training run."""
    config, log = load_config(run_dir / "config.yaml"), read_log(run_dir)
    last, planned = log[-1], config.training.max_train_steps
    seconds = statistics.median(record["seconds"] for record in log)
    parts = "UNet and text encoder" if config.lora.train_text_encoder else "UNet"
    saved = sorted((path.name for path in run_dir.glob("checkpoint-*")), key=lambda n: int(n[11:]))
    facts = {
        "run": paths.relative(run_dir),
        "base model": config.base_model,
        "LoRA": f"rank {config.lora.rank}, alpha {config.lora.alpha:g}, on {parts}",
        "steps": f"{last['step']} of {planned}, {last['n_images']} images each",
        "time": f"{seconds:.2f} s a step, {seconds / last['n_images']:.2f} s an image",
        "memory": f"{max(record['peak_memory_gb'] for record in log):.1f} GB at most",
        "loss": f"{last['loss']:.4f} at the last step",
        "saved": ", ".join([*saved, *(["final"] if (run_dir / "final").is_dir() else [])]) or "nothing",
    }
    return "\n".join(f"{name:<11} {fact}" for name, fact in facts.items())
