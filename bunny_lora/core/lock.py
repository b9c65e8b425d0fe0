"""One writer a run folder: a lock that the system itself takes back when its process ends."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from bunny_lora.core import paths
from bunny_lora.errors import BunnyLoraError

LOCK = ".lock"


@contextlib.contextmanager
def acquire(run_dir: Path) -> Iterator[None]:
    """Keep every other process, and every other call in this one, from writing into `run_dir`.

    The file says who writes; what locks is the system, so the file of a process that was killed locks
    nobody out. It is removed before the lock is given back: who has opened it by then sees that it has
    no name any more, and begins anew.

    Raises:
        BunnyLoraError: somebody else writes there, or the folder cannot be written.
    """
    path = run_dir / LOCK
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        lock.acquire()
    except Timeout:
        raise BunnyLoraError(
            f"{paths.relative(run_dir)} is being written by {_writer(path)}. One run folder has one"
            " writer: wait for it, stop it, or set output_dir to another folder."
        ) from None
    except OSError as error:
        raise BunnyLoraError(
            f"Could not write in {run_dir}: {error.strerror}. Nothing was changed; make the folder"
            " writable or choose another one with output_dir."
        ) from error
    try:
        _sign(path)
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file.
            path.unlink()
        lock.release()
        with contextlib.suppress(OSError):  # Of a run that could not even begin, nothing stays.
            run_dir.rmdir()


def _sign(path: Path) -> None:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    writer = {"process": os.getpid(), "computer": platform.node(), "since": started}
    with contextlib.suppress(OSError):  # A full disk is found where something is lost by it.
        path.write_text(json.dumps(writer) + "\n", encoding="utf-8")


def _writer(path: Path) -> str:
    try:
        writer = json.loads(path.read_text(encoding="utf-8"))
        return "process {process} on {computer}, since {since}".format(**writer)
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
