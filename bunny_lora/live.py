"""Training under one's eyes in a notebook: its own, or that of runs which somebody else has started.

Both views read the run's files alone, and their buttons leave requests there, so they are the same.
Where nobody watches, under papermill or nbval, progress is lines and what stays is a figure.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import html
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from IPython.display import display

from bunny_lora import report
from bunny_lora.core import paths, requests
from bunny_lora.core.progress import is_watched
from bunny_lora.errors import BunnyLoraError
from bunny_lora.report.run_state import RunState
from bunny_lora.trainer import LoRATrainer

EVERY_SEC, SELDOM_SEC = 2.0, 15.0  # between two drawings of the view
SHARE = 0.05  # of the time may go into drawing, where that is not too seldom
N_TURNS = 10  # of the kernel's loop until a message that has come is dealt with

BUTTONS: dict[requests.Kind, tuple[str, str]] = {
    "sample": ("sample now", "draw the validation prompts with the weights as they are"),
    "save": ("save now", "write a checkpoint of the last step, which stays"),
    "stop": ("stop after this step", "save and end; the same command goes on from there"),
}


class RunView:
    """A run as a widget, `box`: how it stands, its figure, and buttons that ask it for something."""

    def __init__(self, run_dir: Path, width: str = "100%") -> None:
        self.run_dir = run_dir
        self.said, self.table, self.figure = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.buttons = {kind: self._button(kind) for kind in BUTTONS}
        row = widgets.HBox(list(self.buttons.values()), layout={"flex_flow": "row wrap"})
        layout = {"width": width, "min_width": "360px"}
        self.box = widgets.VBox([row, self.said, self.table, self.figure], layout=layout)
        self.due = 0.0
        self.seen: tuple[Any, ...] | None = None

    def _button(self, kind: requests.Kind) -> widgets.Button:
        label, meaning = BUTTONS[kind]
        button = widgets.Button(description=label, tooltip=meaning, disabled=True)
        button.on_click(lambda _: self.ask(kind))
        return button

    def ask(self, kind: requests.Kind) -> None:
        """Leave a request for the run."""
        try:
            requests.ask(self.run_dir, kind)
        except BunnyLoraError as error:
            self._say(str(error))
            return
        self.buttons[kind].disabled = True
        when = "after this step" if kind == "stop" else "before the next micro-batch"
        self._say(f"Asked to {kind}: done {when}.")

    def refresh_if_due(self) -> None:
        """Read the run's files and draw again, if they have changed and it was long enough ago."""
        if (started := time.monotonic()) < self.due:
            return
        try:
            self.refresh()
        except Exception as error:  # Training is not to end with its view, nor the view in silence.
            self._say(f"The view has failed: {type(error).__name__}: {error}")
        spent = time.monotonic() - started
        self.due = time.monotonic() + min(SELDOM_SEC, max(EVERY_SEC, spent / SHARE))

    def refresh(self) -> None:
        """Read the run's files and draw again, if they have changed."""
        try:
            state = report.read_run(self.run_dir)
        except BunnyLoraError as error:
            self._say(str(error))
            return
        for kind, button in self.buttons.items():
            button.disabled = not state.is_working or kind in state.asked
        known = (state.step, state.status, state.samples, state.asked, len(state.validation))
        if known == self.seen:
            return
        if self.seen is not None and self.seen[3] and not state.asked:
            self._say("")
        self.seen = known
        self.table.value = as_table(state)
        self.figure.value = as_image(state) if state.steps else ""

    def _say(self, text: str) -> None:
        self.said.value = f"<i>{html.escape(text)}</i>"


def as_table(state: RunState) -> str:
    """Return what is to be known of a run as a table of HTML."""
    facts = {"run": state.name} | report.facts(state)
    cells = [
        f"<tr><th style='text-align: left; padding-right: 1em'>{html.escape(name)}</th>"
        f"<td>{html.escape(fact)}</td></tr>"
        for name, fact in facts.items()
    ]
    return f"<table>{''.join(cells)}</table>"


def as_image(state: RunState) -> str:
    """Return a run's figure as an image of HTML, its facts as the alternative text."""
    data = base64.b64encode(report.run_figure(state).as_png()).decode()
    alt = html.escape(report.run_text(state).replace("\n", "; "), quote=True)
    return f'<img style="width: 100%" alt="{alt}" src="data:image/png;base64,{data}">'


async def train(trainer: LoRATrainer) -> Path:
    """Train as `trainer.train()` does, with a view of the run and buttons; return its `final/` folder.

    To be awaited: between two micro-batches the kernel then hears of buttons that were pressed. When
    the run ends, a figure takes the view's place. Where nobody watches there are lines, and then the
    figure.

    Raises:
        StoppedError: the run was stopped, by a button, a signal or another program; its state is saved.
        BunnyLoraError: as `trainer.train()`.
    """
    view = RunView(trainer.run_dir) if is_watched() else None
    shown = display(view.box, display_id=True) if view else None
    try:
        with contextlib.closing(trainer.ticks(bar=view is None)) as ticks:
            for _ in ticks:
                if view:
                    view.refresh_if_due()
                    await _hear()
    finally:
        _leave_a_figure(trainer.run_dir, shown.update if shown else display)
    return trainer.run_dir / "final"


async def _hear() -> None:
    for _ in range(N_TURNS):
        await asyncio.sleep(0)


def _leave_a_figure(run_dir: Path, show: Callable[[object], object]) -> None:
    with contextlib.suppress(BunnyLoraError):  # Nothing was begun, and what is raised says why.
        show(report.run_figure(report.read_run(run_dir)))


_followed: set[asyncio.Task] = set()


def folders(runs: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the folders of runs: of one, of several, or with "working" of those that work now.

    Raises:
        BunnyLoraError: no run lies there.
    """
    if runs == "working":
        return report.working_runs()
    named = [runs] if isinstance(runs, str | Path) else runs
    return [paths.resolve(run) for run in named]


def watch(runs: Sequence[Path]) -> None:
    """Show runs side by side as they go on, whoever started them; they take no notice of it.

    The view lives until the cell is run again. Where nobody watches, it is text and figures of now.

    Args:
        runs: their folders.

    Raises:
        BunnyLoraError: no run lies there.
    """
    states = [report.read_run(run) for run in runs]
    if not is_watched():
        print("\n\n".join(report.run_text(state) for state in states))
        for state in states:
            display(report.run_figure(state))
        return
    while _followed:
        _followed.pop().cancel()
    views = [RunView(run, "100%" if len(runs) == 1 else "49%") for run in runs]
    display(widgets.HBox([view.box for view in views], layout={"flex_flow": "row wrap"}))
    _followed.add(asyncio.get_running_loop().create_task(_follow(views)))


async def _follow(views: list[RunView]) -> None:
    while True:
        for view in views:
            view.refresh_if_due()
        await asyncio.sleep(EVERY_SEC / 4)
