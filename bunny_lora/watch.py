"""Runs in a terminal: one screen that is drawn again and again, or one tidy text where none is."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bunny_lora import report
from bunny_lora.core import paths, requests
from bunny_lora.errors import BunnyLoraError
from bunny_lora.report.run_state import RunState
from bunny_lora.report.training_figures import smoothed

EVERY_SEC = 2.0
BARS = "▁▂▃▄▅▆▇█"
PLAIN_BARS = "_.-=+*#@"
COLOURS = {"working": "green", "finished": "blue", "stopped": "yellow", "failed": "red", "died": "red"}
PANEL_WIDTH = 76


def ask(runs: Sequence[Path], kind: requests.Kind) -> None:
    """Leave a request for each of some runs, and say so.

    Raises:
        BunnyLoraError: one of them does not work, so it could not obey; then none is asked.
    """
    states = [report.read_run(run) for run in runs]
    if idle := [f"{state.name} ({state.status.state})" for state in states if not state.is_working]:
        raise BunnyLoraError(f"Only a run that works can be asked to {kind}; not {', '.join(idle)}.")
    for state in states:
        requests.ask(state.run_dir, kind)
        when = "after the step that it is at" if kind == "stop" else "within a micro-batch"
        print(f"{state.name} is asked to {kind}, and does so {when}.")


def watch(runs: Sequence[Path], *, once: bool = False) -> None:
    """Show runs until all have ended, or until Ctrl-C, which ends the watching and no run.

    Args:
        runs: their folders.
        once: show them as they are now; so it is where no terminal is, too.

    Raises:
        BunnyLoraError: no run lies there.
    """
    states = [report.read_run(run) for run in runs]
    console = Console()
    if once or not console.is_terminal:
        print("\n\n".join(report.run_text(state) for state in states))
        return
    try:
        with Live(screen_of(states, console), console=console, auto_refresh=False) as live:
            while any(state.is_working for state in states):
                time.sleep(EVERY_SEC)
                states = [report.read_run(run) for run in runs]
                live.update(screen_of(states, console), refresh=True)
    except KeyboardInterrupt:
        names = ", ".join(paths.relative(run) for run in runs)
        print(f"No longer watched, and left as they are: {names}")


def screen_of(states: Sequence[RunState], console: Console) -> RenderableType:
    """Return runs as panels, side by side where there is room."""
    width = min(PANEL_WIDTH, console.width)
    panels = [_panel(state, width, plain=console.options.ascii_only) for state in states]
    return Columns(panels) if len(panels) > 1 else panels[0]


def _panel(state: RunState, width: int, *, plain: bool) -> Panel:
    table = Table.grid(padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in report.facts(state).items():
        table.add_row(Text(name), Text(fact))
    bar = ProgressBar(total=state.n_steps or 1, completed=state.step, width=width - 4)
    losses = [record["loss"] for record in state.steps if math.isfinite(record["loss"])]
    curve = sparkline(
        smoothed(losses, max(1, len(losses) // 10)), width - 4, PLAIN_BARS if plain else BARS
    )
    # A bar has no end of line of its own: hence the columns.
    rows = Group(Columns([bar]), table, Text(curve, style="blue"))
    colour = COLOURS[state.status.state]
    return Panel(rows, title=Text(state.name), border_style=colour, width=width)


def sparkline(values: Sequence[float], width: int, bars: str = BARS) -> str:
    """Return a curve of one line: each letter is the mean of its share of the values, low to high."""
    if not values:
        return ""
    n = min(width, len(values))
    edges = [round(i * len(values) / n) for i in range(n + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(bars) - 1) / (high - low) if high > low else 0
    return "".join(bars[round((mean - low) * scale)] for mean in means)
