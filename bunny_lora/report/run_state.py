"""A run as its files tell it, while it works and after: read by whoever looks over its shoulder."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bunny_lora.config import Config, load_config
from bunny_lora.core import paths, requests
from bunny_lora.core.status import STATUS, Status, read_status
from bunny_lora.errors import BunnyLoraError
from bunny_lora.training.banner import duration
from bunny_lora.training.log import LOG, TIMING, VALIDATION, read_records

N_RECENT = 20  # steps that "now" is the mean of
DEPTH = 4  # folders below outputs/ in which runs are looked for


@dataclass(frozen=True)
class RunState:
    """What is known of a run. `steps` and `validation` are records as logged, oldest first.

    `n_damaged` counts lines of its logs that cannot be read, `samples` are the newest pictures, and
    `asked` what it has been asked for and not done yet. `config` is None where it cannot be read.
    """

    run_dir: Path
    status: Status
    config: Config | None
    steps: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    n_damaged: int
    samples: list[Path]
    asked: list[requests.Kind]

    @property
    def name(self) -> str:
        """Its folder, from the project root."""
        return paths.relative(self.run_dir)

    @property
    def is_working(self) -> bool:
        """Whether somebody trains it now."""
        return self.status.state == "working"

    @property
    def step(self) -> int:
        """The last step that is logged."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def n_steps(self) -> int | None:
        """How many steps it is to have."""
        return self.config.training.max_train_steps if self.config else None

    @property
    def sample_step(self) -> int | None:
        """The step that `samples` were drawn after."""
        return int(self.samples[0].parent.name.removeprefix("step-")) if self.samples else None

    @property
    def seen(self) -> Counter[str]:
        """How many images it has seen of each character."""
        seen: Counter[str] = Counter()
        for record in self.steps:
            seen.update(record.get("characters", {}))
        return Counter(dict(seen.most_common()))

    @property
    def seconds_left(self) -> float | None:
        """How long it still takes, with its samples and saves: as this session went so far."""
        if not self.is_working or self.n_steps is None or not self.steps:
            return None
        n_left = self.n_steps - self.step
        times = [r["time"] for r in self.steps if r.get("time", 0) >= self.status.since]
        if len(times) > 1:
            return n_left * (times[-1] - times[0]) / (len(times) - 1)
        seconds = [r["seconds"] for r in self.steps if "seconds" in r]
        return n_left * statistics.median(seconds) if seconds else None


def read_run(run_dir: Path) -> RunState:
    """Read a run's folder, and change nothing in it.

    Raises:
        BunnyLoraError: no run lies there.
    """
    if not any((run_dir / name).exists() for name in ("config.yaml", LOG, STATUS, ".lock")):
        raise BunnyLoraError(
            f"No run in {paths.relative(run_dir)}: name the output_dir of one, or start it first."
        )
    try:
        config = load_config(run_dir / "config.yaml")
    except BunnyLoraError:
        config = None
    steps, n_damaged = read_steps(run_dir)
    validation, n_more = read_records(run_dir / VALIDATION)
    status = read_status(run_dir)
    folders = sorted(
        folder for folder in (run_dir / "samples").glob("step-*") if any(folder.glob("*.png"))
    )
    samples = sorted(folders[-1].glob("*.png")) if folders else []
    asked = requests.pending(run_dir)
    return RunState(run_dir, status, config, steps, validation, n_damaged + n_more, samples, asked)


def read_steps(run_dir: Path) -> tuple[list[dict[str, Any]], int]:
    """Return one record a step, with its times, and how many lines cannot be read.

    Of a step logged twice the later one counts. A loss that was not finite is NaN.
    """
    records: dict[int, dict[str, Any]] = {}
    n_damaged = 0
    for name in (LOG, TIMING):
        found, n = read_records(run_dir / name)
        n_damaged += n
        for record in found:
            records[record["step"]] = records.get(record["step"], {}) | record
    log = [records[step] for step in sorted(records) if "loss" in records[step]]
    for record in log:
        if record["loss"] is None:  # A step that was skipped, for its loss was not finite.
            record["loss"] = math.nan
    return log, n_damaged


def working_runs() -> list[Path]:
    """Return the runs below outputs/ that work now; where none does, the one that did last."""
    outputs = paths.resolve("outputs")
    patterns = [f"{'*/' * depth}{name}" for depth in range(1, DEPTH + 1) for name in (STATUS, LOG)]
    folders = {path.parent for pattern in patterns for path in outputs.glob(pattern)}
    working = sorted(folder for folder in folders if read_status(folder).state == "working")
    newest = sorted(folders, key=lambda folder: folder.stat().st_mtime)[-1:]
    if not folders:
        raise BunnyLoraError("No run below outputs/: start one, or name the folder of a run.")
    return working or newest


# ---------------------------------------------------------------------------- in words


def facts(state: RunState) -> dict[str, str]:
    """Return what is to be known of a run now, a line each."""
    recent = [r for r in state.steps if math.isfinite(r["loss"])][-N_RECENT:]
    last = state.steps[-1] if state.steps else {}
    found = {"state": how(state), "step": _step(state)}
    if recent:
        mean = statistics.mean(r["loss"] for r in recent)
        found["loss"] = f"{mean:.4f}, mean of the last {len(recent)} steps"
    if state.validation:
        newest = state.validation[-1]
        named = [f"{name} {loss:.4f}" for name, loss in newest.get("characters", {}).items()]
        what = ", ".join(named) or f"{newest['loss']:.4f}"
        found["held out"] = f"{what}, after step {newest['step']}"
    if last:
        found["learning rate"] = f"{last['learning_rate']:.2e}"
    if timed := [r["seconds"] / r["n_images"] for r in state.steps if "seconds" in r][-N_RECENT:]:
        found["an image"] = f"{statistics.median(timed):.2f} s"
        found["memory"] = f"{last.get('peak_memory_gb', math.nan):.1f} GB at most"
    if state.seen:
        found["images seen"] = ", ".join(f"{name} {n}" for name, n in state.seen.items()) + _since(
            state
        )
    if (left := state.seconds_left) is not None:
        found["time left"] = duration(left)
    if state.samples:
        found["samples"] = paths.relative(state.samples[0].parent)
    if state.asked:
        found["asked for"] = ", ".join(state.asked)
    if state.n_damaged:
        found["logs"] = f"{state.n_damaged} lines cannot be read and are left out"
    return found


def how(state: RunState) -> str:
    """Return in words whether a run works, or how it ended."""
    status = state.status
    return f"{status.state}: {status.said}" if status.said else status.state


def run_text(state: RunState) -> str:
    """Return a run in a few lines, its folder first."""
    lines = [f"  {name:<14} {text}" for name, text in facts(state).items()]
    return "\n".join([state.name, *lines])


def _step(state: RunState) -> str:
    if state.n_steps is None:
        return f"{state.step}; config.yaml cannot be read"
    return f"{state.step} of {state.n_steps} ({100 * state.step / state.n_steps:.0f} %)"


def _since(state: RunState) -> str:
    """Older steps were logged without it."""
    first = next(r["step"] for r in state.steps if "characters" in r)
    return "" if first == state.steps[0]["step"] else f", from step {first} on"
