"""One writer a run folder: a lock that the system itself takes back when its process ends."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel

from bunny_lora.core import files, paths
from bunny_lora.errors import BunnyLoraError

LOCK = ".lock"
HEARTBEAT_SEC = 15.0
SILENT_SEC = 120.0  # without a heartbeat, on another computer: the writer has died
# What mounts without locks answer, network disks most of all.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class Writer(BaseModel):
    """What the file says: who writes."""

    process: int
    computer: str
    since: str


@dataclass(frozen=True)
class Holder:
    """Who has locked a folder; `lost` tells by what it is known to be gone, None: it works."""

    writer: Writer | None
    lost: str | None


@contextlib.contextmanager
def acquire(run_dir: Path) -> Iterator[None]:
    """Keep every other process, and every other call in this one, from writing into `run_dir`.

    The file says who writes; what locks is the system, so the file of a process that was killed locks
    nobody out. It is removed before the lock is given back: who has opened it by then sees that it has
    no name any more, and begins anew. On a disk without locks, what the file says has to do.

    Raises:
        BunnyLoraError: somebody else writes there, or the folder cannot be written.
    """
    path = run_dir / LOCK
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0, fallback_to_soft=False)
        lock.acquire()
    except Timeout:
        raise _taken(path) from None
    except OSError as error:
        if error.errno in NO_LOCKS:
            _go_on_without(path, error)
        else:
            raise BunnyLoraError(
                f"Could not write in {run_dir}: {error.strerror}. Nothing was changed; make the folder"
                " writable or choose another one with output_dir."
            ) from error
    try:
        _sign(path)
        with _heartbeat(path):
            yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file.
            path.unlink()
        lock.release()
        with contextlib.suppress(OSError):  # Of a run that could not even begin, nothing stays.
            run_dir.rmdir()


@contextlib.contextmanager
def _heartbeat(path: Path) -> Iterator[None]:
    """Keep the file's time fresh: on another computer it is all that tells a writer that works."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT_SEC):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True, name="bunny_lora heartbeat")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def find_holder(run_dir: Path) -> Holder | None:
    """Return who has locked `run_dir`, by the file alone: trying the lock would keep a writer out.

    On this computer its process tells whether it lives; on another one the file's time does.
    """
    path = run_dir / LOCK
    try:
        silent_sec = time.time() - path.stat().st_mtime
    except OSError:
        return None
    by = _signed(path)
    if by is not None and by.computer == platform.node():
        alive = files.is_alive(by.process, path)
        return Holder(by, None if alive else f"process {by.process} is gone without a word")
    if silent_sec < SILENT_SEC:
        return Holder(by, None)
    who = f"process {by.process} on {by.computer}" if by else "its process"
    return Holder(by, f"no sign of life from {who} for {silent_sec / 60:.0f} min")


def _sign(path: Path) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    writer = Writer(process=os.getpid(), computer=platform.node(), since=since)
    with contextlib.suppress(OSError):  # A full disk is found where something is lost by it.
        path.write_text(writer.model_dump_json() + "\n", encoding="utf-8")


def _signed(path: Path) -> Writer | None:
    try:
        return Writer.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def _taken(path: Path) -> BunnyLoraError:
    by = _signed(path)
    writer = f"process {by.process} on {by.computer}, since {by.since}" if by else "another process"
    return BunnyLoraError(
        f"{paths.relative(path.parent)} is being written by {writer}. One run folder has one"
        " writer: wait for it, stop it, or set output_dir to another folder."
    )


def _go_on_without(path: Path, error: OSError) -> None:
    """Say that the disk has no locks, and refuse if a process of this computer writes there."""
    by = _signed(path)
    if by and by.computer == platform.node() and files.is_alive(by.process, path):
        raise _taken(path) from None
    print(
        f"{paths.relative(path.parent)} is on a disk without locks ({error.strerror}): if another"
        " computer writes there too, nobody will notice."
    )
