"""`log.jsonl`, what training did, and `timing.jsonl`, when and how long that took on this machine.

Apart, because the first is a function of the configuration alone: an unbroken run and one that was cut
off and gone on with write the same bytes. So is `validation.jsonl`, the loss on held-out frames.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bunny_lora.core import files
from bunny_lora.errors import BunnyLoraError

LOG, TIMING, VALIDATION = "log.jsonl", "timing.jsonl", "validation.jsonl"
TIMES = ("seconds", "peak_memory_gb", "time")


class RunLog:
    """The two files of one run, open for its next steps."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        with self._writing():
            self.files = [(run_dir / name).open("a", encoding="utf-8") for name in (LOG, TIMING)]

    def write(self, record: dict[str, Any]) -> None:
        """Append one step.

        Raises:
            BunnyLoraError: the disk is full, or the files cannot be written.
        """
        what = {key: _plain(value) for key, value in record.items() if key not in TIMES}
        record = record | {"time": round(time.time(), 2)}
        times = {key: record[key] for key in ("step", *TIMES)}
        with self._writing():
            for file, line in zip(self.files, (what, times), strict=True):
                file.write(json.dumps(line) + "\n")
                file.flush()

    def sync(self) -> None:
        """Have the lines on the disk before a checkpoint that counts on them."""
        with self._writing():
            for file in self.files:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close both files."""
        with self._writing():
            for file in self.files:
                file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BunnyLoraError(
                f"Could not write the log in {self.run_dir}: {error.strerror}. The checkpoints written"
                " so far are whole; free some space, then run the same command again."
            ) from error


def _plain(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log, without lines that cannot be read."""
    yield from read_records(path)[0]


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records of a log, and how many lines are none: cut off, damaged, or without a step.

    A last line without its end is still being written, and counts as neither.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    whole, _, rest = text.rpartition("\n")
    found = [_record(line) for line in whole.split("\n") if line.strip()]
    n_damaged = found.count(None)
    last = _record(rest)  # Whole but for its end, if another program wrote the file.
    return [record for record in [*found, last] if record is not None], n_damaged


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_one = isinstance(record, dict) and type(record.get("step")) is int
    return record if is_one else None


def append_validation(run_dir: Path, record: dict[str, Any]) -> None:
    """Add the loss on held-out frames after a step to `validation.jsonl`.

    Raises:
        BunnyLoraError: the disk is full, or the file cannot be written.
    """
    records = [*read_lines(run_dir / VALIDATION), record]
    files.write_text(run_dir / VALIDATION, "".join(json.dumps(r) + "\n" for r in records))


def cut_after(run_dir: Path, step: int, source: Path | None = None) -> tuple[int, float]:
    """Drop the lines after `step`: lost with the state, and done again.

    Args:
        run_dir: where the log is to go on.
        step: the last step to keep.
        source: the run folder whose log it continues; None is the same.

    Returns:
        How many steps were dropped, and how many seconds they had taken.
    """
    lost = 0.0
    last = step
    for name in (LOG, TIMING, VALIDATION):
        records = list(read_lines((source or run_dir) / name))
        if name == VALIDATION and not records:
            continue
        kept = {record["step"]: record for record in records if record["step"] <= step}
        lost += sum(r.get("seconds", 0.0) for r in records if r["step"] > step)
        last = max([last, *(record["step"] for record in records)])
        text = "".join(json.dumps(record) + "\n" for record in kept.values())
        files.write_text(run_dir / name, text)
    return last - step, lost
