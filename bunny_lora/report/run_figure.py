"""A run at one glance, while it works or after: losses, learning rate, who was seen, newest samples."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bunny_lora.config import load_config
from bunny_lora.core.image_file import read_metadata
from bunny_lora.errors import BunnyLoraError
from bunny_lora.prepare import read_split
from bunny_lora.report.plot import (
    BLUE,
    GREEN,
    GREY,
    LABEL_PT,
    ORANGE,
    SMALL_PT,
    Plot,
    clean,
    cut,
    show,
    wrap,
)
from bunny_lora.report.plot import spread as evenly
from bunny_lora.report.run_state import RunState, how
from bunny_lora.report.training_figures import smoothed
from bunny_lora.training.banner import duration

# Of Okabe and Ito's palette, like the rest; dashes tell apart what is left.
LINES = (ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00")
MAX_CHARACTERS = 8
N_FRAMES, N_SAMPLES = 3, 3
CELL_IN, GAP_IN = 1.5, 0.08
CHARTS_IN = 3.75  # where the pictures begin


def run_figure(state: RunState) -> Plot:
    """Show how a run stands: what has no record yet says so in its place."""
    has_pictures = bool(state.samples and state.steps)
    height = CHARTS_IN + (CELL_IN + 0.75 if has_pictures else 0.1) if state.steps else 1.5
    left = f", {duration(state.seconds_left)} left" if state.seconds_left is not None else ""
    of = f" of {state.n_steps}" if state.n_steps else ""
    title = f"{cut(state.name, 60)}: step {state.step}{of}{left}"
    figure = Plot(height, title, cut(" ".join(how(state).split()), 120))
    if not state.steps:
        figure.label(0.12, 0.8, "No step is finished yet.", size=LABEL_PT, color=GREY)
    else:
        _losses(clean(figure.panel(0.75, 0.95, 5.5, 2.3), grid="y"), state)
        _learning_rate(clean(figure.panel(7.35, 0.95, 2.45, 0.75), "Learning rate"), state)
        _seen(figure, state)
    if has_pictures:
        _pictures(figure, state)
    return figure


def _losses(axes: Axes, state: RunState) -> None:
    log = [record for record in state.steps if math.isfinite(record["loss"])]
    steps, losses = [r["step"] for r in log], [r["loss"] for r in log]
    window = max(1, len(log) // 10)
    alone = window == 1
    marker = "o" if len(log) < 30 else None
    axes.plot(
        steps,
        losses,
        color=BLUE,
        alpha=1 if alone else 0.3,
        lw=1,
        marker=marker,
        ms=3,
        label="one step",
    )
    if not alone:
        label = f"mean of the last {window} steps"
        axes.plot(steps, smoothed(losses, window), color=BLUE, lw=2, label=label)
    for name, points in _validation(state).items():
        number = list(_validation(state)).index(name)
        axes.plot(
            *zip(*points, strict=True),
            color=LINES[number % len(LINES)],
            ls="-" if number < len(LINES) else "--",
            lw=1.5,
            marker="s",
            ms=max(3, 7 - number),  # The lower ones stay visible below.
            label=f"held out: {cut(name, 14)}",
        )
    axes.set_xlabel(f"optimiser step ({state.steps[-1]['n_images']} images each)", size=LABEL_PT)
    axes.set_ylabel("loss (mean squared error)", size=LABEL_PT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if losses:
        _above_the_outliers(axes, losses)
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
    axes.legend(frameon=False, fontsize=SMALL_PT, ncols=4, columnspacing=1, handlelength=1.5, **place)


def _above_the_outliers(axes: Axes, losses: list[float]) -> None:
    """A single step of a hard noise level is not to press the rest flat."""
    low, high = axes.get_ylim()
    typical = sorted(losses)[int(0.98 * (len(losses) - 1))]
    axes.set_ylim(max(0, low), min(high, 1.6 * typical) or 1)


def _validation(state: RunState) -> dict[str, list[tuple[int, float]]]:
    """Return the loss on held-out frames by step, of each character, or of all where none is named."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in state.validation:
        for name, loss in (record.get("characters") or {"all": record["loss"]}).items():
            found.setdefault(name, []).append((record["step"], loss))
    return dict(list(found.items())[:MAX_CHARACTERS])


def _learning_rate(axes: Axes, state: RunState) -> None:
    rates = [record["learning_rate"] for record in state.steps]
    exponent = math.floor(math.log10(max(rates))) if max(rates) > 0 else 0
    scaled = [rate / 10**exponent for rate in rates]
    axes.plot([record["step"] for record in state.steps], scaled, color=ORANGE, lw=1.5)
    axes.set_ylim(0, 1.15 * max(scaled) or 1)
    axes.set_title(f"Learning rate (x 1e{exponent})", size=LABEL_PT, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3))


def _seen(figure: Plot, state: RunState) -> None:
    seen = dict(state.seen.most_common(MAX_CHARACTERS))
    if not seen:
        figure.label(7.35, 2.15, "Images seen of each character", size=LABEL_PT)
        figure.label(7.35, 2.4, "the data name nobody, or the log is older", color=GREY)
        return
    axes = clean(figure.panel(7.35, 2.35, 2.45, 0.9), "Images seen of each character")
    axes.barh([cut(name, 12) for name in seen], list(seen.values()), color=BLUE, height=0.7)
    axes.invert_yaxis()
    size = SMALL_PT if len(seen) <= 5 else SMALL_PT - 3
    axes.tick_params(axis="y", labelsize=size)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    for row, count in enumerate(seen.values()):
        axes.text(count, row, f" {count}", size=size, va="center")
    axes.set_xlim(0, 1.25 * max(seen.values()))


# ---------------------------------------------------------------------------- pictures


def _pictures(figure: Plot, state: RunState) -> None:
    samples = evenly(state.samples, N_SAMPLES)
    prompts = [str((read_metadata(path) or {}).get("prompt", "")) for path in samples]
    frames = _frames_for(state, prompts)
    top, left = CHARTS_IN + 0.3, 0.12
    for heading, pictures, notes in (
        ("training frames", [path for path, _ in frames], [caption for _, caption in frames]),
        (f"samples after step {state.sample_step}", samples, prompts),
    ):
        if pictures:
            figure.label(left, top - 0.2, heading, size=LABEL_PT, weight="bold")
        for picture, note in zip(pictures, notes, strict=True):
            show(figure.panel(left, top, CELL_IN, CELL_IN), picture)
            figure.label(left, top + CELL_IN + 0.05, wrap(note, 24, 2), color=GREY)
            left += CELL_IN + GAP_IN
        left += 0.25
    if not frames:
        figure.label(left, top, "The training frames are not\non this computer.", color=GREY)


def _frames_for(state: RunState, prompts: list[str]) -> list[tuple[Path, str]]:
    """Return training frames and their captions: first of those who are drawn."""
    known = _frames(state.run_dir)
    drawn = [frame for text in prompts for frame in known if any(name in text for name in frame[2])]
    chosen = evenly(list(dict.fromkeys(drawn)) or list(known), N_FRAMES)
    return [(path, caption) for path, caption, _ in chosen]


@lru_cache(maxsize=8)
def _frames(run_dir: Path) -> tuple[tuple[Path, str, tuple[str, ...]], ...]:
    """Return path, caption and characters of every training frame; none where they do not lie here."""
    try:
        samples, _ = read_split(load_config(run_dir / "config.yaml"))
    except BunnyLoraError:
        return ()
    return tuple((sample.path, sample.caption, tuple(sample.characters)) for sample in samples)
