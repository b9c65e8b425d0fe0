"""`log.jsonl`, what training did, and `timing.jsonl`, how long that took on this machine.

Apart, because the first is a function of the configuration alone: an unbroken run and one that was cut
off and gone on with write the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bunny_lora.core import files
from bunny_lora.errors import BunnyLoraError

LOG, TIMING = "log.jsonl", "timing.jsonl"
TIMES = ("seconds", "peak_memory_gb")


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
    """Yield the records of a log, without a last line that was cut off."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


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
    for name in (LOG, TIMING):
        records = list(read_lines((source or run_dir) / name))
        kept = {record["step"]: record for record in records if record["step"] <= step}
        lost += sum(r.get("seconds", 0.0) for r in records if r["step"] > step)
        last = max([last, *(record["step"] for record in records)])
        text = "".join(json.dumps(record) + "\n" for record in kept.values())
        files.write_text(run_dir / name, text)
    return last - step, lost
