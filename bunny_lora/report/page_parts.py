"""Parts of a run's page that are numbers and lists: data, training, choice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from bunny_lora.config import Config
from bunny_lora.core import paths
from bunny_lora.core.choice import Choice
from bunny_lora.data.frames import Sample
from bunny_lora.data.summary import remarks
from bunny_lora.dataset import data_sha256, load_summary
from bunny_lora.errors import BunnyLoraError
from bunny_lora.prepare import find_weak_spots, read_split, reading
from bunny_lora.report.grids import NO_SAMPLES, sample_cells
from bunny_lora.report.plot import BLUE, LABEL_PT, SMALL_PT, Plot, clean, spread
from bunny_lora.report.training_figures import read_log, run_facts, smoothed
from bunny_lora.report.web import Picture, Strip

N_FRAMES, N_CHARACTERS, N_DROPPED = 12, 24, 40
WIDEST_BAR_REM = 12.0
CHART_WIDTH_IN, CHART_HEIGHT_IN = 4.6, 2.5  # as wide as a phone, so that its letters can be read there


def data(config: Config, trained_on: str | None) -> dict[str, Any]:
    """Return what the training data are, and their weak spots.

    Args:
        config: of the run.
        trained_on: the hash of the data that the run recorded; None where it recorded none.

    Raises:
        BunnyLoraError: they cannot be read.
    """
    kept, held = read_split(config)
    summary = load_summary(config.data_path)
    counts = Counter(name for sample in [*kept, *held] for name in sample.characters)
    found = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    largest = max(counts.values(), default=1)
    more = len(found) - N_CHARACTERS
    return {
        "headline": _headline(config, kept, held, summary),
        "characters": [
            {"name": name, "n": n, "rem": round(WIDEST_BAR_REM * n / largest, 2)}
            for name, n in found[:N_CHARACTERS]
        ],
        "characters_more": f"And {more} more, in fewer frames." if more > 0 else "",
        "stale": _stale(config, trained_on),
        "frames": [_frames(kept)],
        "dropped": _dropped(summary),
        "remarks": remarks(summary) if summary else [],
        **_weak_spots(config),
    }


def _headline(
    config: Config, kept: Sequence[Sample], held: Sequence[Sample], summary: dict[str, Any] | None
) -> str:
    line = f"{len(kept)} frames in {paths.relative(config.data_path)}"
    if held:
        line += f", and {len(held)} held out of training"
    if summary is None:
        return f"{line}; nobody prepared them, so what was left out is not known."
    return f"{line}, from {summary['n_entries']} entries of {summary['source']}."


def _stale(config: Config, trained_on: str | None) -> str:
    if trained_on is None or data_sha256(config.data_path, **reading(config)) == trained_on:
        return ""
    return "These are not the data that the run was trained on: they have changed since."


def _weak_spots(config: Config) -> dict[str, Any]:
    try:
        spots = find_weak_spots(config)
    except BunnyLoraError as error:  # no tokenizer without the base model
        return {"weak_spots": [], "weak_spots_missing": str(error)}
    shown = [
        {"what": s.what, "who": s.who, "answer": s.answer, "is_set": s.is_answered(config)}
        for s in spots
    ]
    return {"weak_spots": shown, "weak_spots_missing": ""}


def _frames(samples: Sequence[Sample]) -> Strip:
    shown = spread(samples, N_FRAMES)
    title = f"{len(shown)} of {len(samples)} frames, evenly spaced"
    boxes = "boxes: faces found by the analysis" if any(sample.faces for sample in shown) else ""
    pictures = [
        Picture(s.path, f"Training frame: {s.caption}", s.caption, boxes=_shares(s)) for s in shown
    ]
    return Strip(title, pictures, boxes)


def _shares(sample: Sample) -> list[tuple[float, ...]]:
    """Return the faces of a frame as shares of its sides; none where its size is not known."""
    if len(sample.size) != 2:
        return []
    sides = (*sample.size, *sample.size)
    return [tuple(x / side for x, side in zip(box, sides, strict=True)) for box in sample.faces]


def _dropped(summary: dict[str, Any] | None) -> list[str]:
    if not summary:
        return []
    dropped = summary["dropped"]
    lines = [f"{item['frame_id']}: {item['reason']}" for item in dropped[:N_DROPPED]]
    more = len(dropped) - N_DROPPED
    return [*lines, f"and {more} more, see data_summary.json"] if more > 0 else lines


def training(run_dir: Path) -> dict[str, Any]:
    """Return how training went.

    Raises:
        BunnyLoraError: there is no log, or no configuration.
    """
    facts = run_facts(run_dir)
    del facts["run"], facts["base model"]
    names, folders = sample_cells(run_dir, max_columns=6, max_rows=8)
    return {"loss": loss_chart(run_dir), "facts": facts} | {
        "samples": [
            Strip(
                prompt,
                [
                    Picture(folder / name, f"{prompt}, after {_step(folder)} steps", _step(folder))
                    for folder in folders
                ],
            )
            for name, prompt in names.items()
        ],
        "no_samples": NO_SAMPLES,
    }


def _step(folder: Path) -> str:
    return f"step {int(folder.name.removeprefix('step-'))}"


def loss_chart(run_dir: Path) -> Plot:
    """Return the loss of every step and its running mean, narrow enough for a phone."""
    log = read_log(run_dir)
    finite = [record for record in log if math.isfinite(record["loss"])]
    steps, losses = [r["step"] for r in finite], [r["loss"] for r in finite]
    skipped = len(log) - len(finite)
    note = "The loss of one step mostly shows how hard its noise levels were: judge by the pictures."
    if skipped:
        note += f" {skipped} of {len(log)} steps had no finite loss."
    figure = Plot(CHART_HEIGHT_IN, "Loss", note, width_in=CHART_WIDTH_IN)
    axes = clean(figure.panel(0.62, 0.1, CHART_WIDTH_IN - 0.72, CHART_HEIGHT_IN - 0.65), grid="y")
    window = max(1, len(losses) // 10)
    axes.plot(steps, losses, color=BLUE, alpha=0.35 if window > 1 else 1, lw=1, label="one step")
    if window > 1:
        label = f"mean of the last {window} steps"
        axes.plot(steps, smoothed(losses, window), color=BLUE, lw=2, label=label)
        axes.legend(frameon=False, fontsize=SMALL_PT, labelcolor="linecolor")
    axes.set_xlabel(f"optimiser step ({log[-1]['n_images']} images each)", size=LABEL_PT)
    axes.set_ylabel("loss (mean squared error)", size=LABEL_PT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return figure


def choice(found: Choice) -> dict[str, Any]:
    """Return what was chosen, out of what."""
    rows = [
        {
            "mark": "chosen" if place == found.chosen else "tied" if place in found.tied else "",
            "label": candidate.label,
            "asked": candidate.asked,
            "identity": candidate.identity,
            "drift": candidate.drift,
        }
        for place, candidate in enumerate(found.candidates)
    ]
    return {"label": found.best.label, "why": found.why, "rows": rows}
