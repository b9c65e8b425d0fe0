"""The training log as figures and a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bunny_lora.config import load_config
from bunny_lora.core import paths
from bunny_lora.errors import BunnyLoraError
from bunny_lora.report.plot import (
    BLUE,
    LABEL_PT,
    ORANGE,
    SMALL_PT,
    Plot,
    clean,
)
from bunny_lora.report.run_state import read_steps
from bunny_lora.training.log import LOG


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """Return one record a step, with its times; of a step logged twice the later one.

    Raises:
        BunnyLoraError: the run has no log, or nothing in it.
    """
    log, _ = read_steps(run_dir)
    if not log:
        raise BunnyLoraError(f"No training steps in {run_dir / LOG}: train first.")
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
    axes.set_ylabel("loss (mean squared error)", size=LABEL_PT, color=BLUE)
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
    return "\n".join(f"{name:<11} {fact}" for name, fact in run_facts(run_dir).items())


def run_facts(run_dir: Path) -> dict[str, str]:
    """Return what `run_summary` says, by name.

    Raises:
        BunnyLoraError: the run has no log, no configuration, or nothing in them.
    """
    config, log = load_config(run_dir / "config.yaml"), read_log(run_dir)
    last, planned = log[-1], config.training.max_train_steps
    timed = [record for record in log if "seconds" in record]
    time = memory = "not recorded"
    if timed:
        seconds = statistics.median(record["seconds"] for record in timed)
        time = f"{seconds:.2f} s a step, {seconds / last['n_images']:.2f} s an image"
        memory = f"{max(record['peak_memory_gb'] for record in timed):.1f} GB at most"
    parts = "UNet and text encoder" if config.lora.train_text_encoder else "UNet"
    saved = sorted((path.name for path in run_dir.glob("checkpoint-*")), key=lambda n: int(n[11:]))
    return {
        "run": paths.relative(run_dir),
        "base model": config.base_model,
        "LoRA": f"rank {config.lora.rank}, alpha {config.lora.alpha:g}, on {parts}",
        "steps": f"{last['step']} of {planned}, {last['n_images']} images each",
        "time": time,
        "memory": memory,
        "loss": f"{last['loss']:.4f} at the last step",
        "saved": ", ".join([*saved, *(["final"] if (run_dir / "final").is_dir() else [])]) or "nothing",
    }
