"""`status.json`: what a run does, or how it ended; and what its lock tells where it could not say."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from bunny_lora.core import files, lock

STATUS = "status.json"

State = Literal["working", "finished", "stopped", "failed", "died"]


class Status(BaseModel):
    """`said` tells what a run is doing, or why it ended; `since` is when it was started, Unix time."""

    state: State
    said: str = ""
    since: float = 0.0


class StatusFile:
    """The status of one run from its start to its end; silent in processes that write nothing."""

    def __init__(self, run_dir: Path, *, writes: bool = True) -> None:
        self.run_dir, self.writes, self.since = run_dir, writes, time.time()

    def write(self, state: State, said: str = "") -> None:
        """Replace what was said before."""
        if self.writes:
            status = Status(state=state, said=said, since=self.since)
            files.write_text(self.run_dir / STATUS, status.model_dump_json() + "\n")


def read_status(run_dir: Path) -> Status:
    """Return what has become of a run, without disturbing it.

    Who works holds the lock, and shows life by its file; who ends, however badly, gives it back and
    says why. So where only a dead process holds it, or nobody, and the last word is that the run works,
    it has died.
    """
    last, held = _written(run_dir), lock.find_holder(run_dir)
    is_working = last is not None and last.state == "working"
    doing = last.said if last and is_working else "getting ready"
    since = last.since if last else 0.0
    if held is not None:
        if held.lost is None:
            return Status(state="working", said=doing, since=since)
        return Status(state="died", said=f"{held.lost}; it was {doing}", since=since)
    if last is None:  # Older runs say nothing.
        return Status(state="finished" if (run_dir / "final").is_dir() else "stopped")
    if is_working:
        return last.model_copy(update={"state": "died", "said": f"it holds no lock; it was {doing}"})
    return last


def _written(run_dir: Path) -> Status | None:
    try:
        return Status.model_validate_json((run_dir / STATUS).read_bytes())
    except (OSError, ValueError):
        return None
