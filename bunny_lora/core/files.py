"""Files written whole or not at all, and read back."""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from bunny_lora.errors import BunnyLoraError

OLD = ".old"
# What mounts answer that flush when they like: network and shared folders, FUSE; EACCES: a folder that
# may be written and not read.
NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; when the block ends well, flush it and rename it.

    The block may write a file or make a folder. A folder that is already there under the final name
    is replaced. When the block fails, the old state stays and the temporary one is removed.

    Raises:
        BunnyLoraError: the disk is full or the folder cannot be written. Other errors of the block,
            an image that cannot be read for one, pass through as they are.
    """
    path = path.absolute()
    temporary, state = None, "What was there before is untouched"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name}.{os.getpid()}."  # `recover` must know whose it was.
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=path.parent))
        yield temporary / path.name
        _flush(temporary / path.name)
        _swap(temporary / path.name, path)
        state = "The new one is there, but a power cut could undo that"
        _fsync(path.parent)
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None or not _is_about(path.parent, refusal):
            raise
        if temporary is not None and (temporary / OLD).exists():
            state = "What was there before has stepped aside, and the next start puts one of both back"
        raise BunnyLoraError(
            f"Could not write {path}: {refusal.strerror}. {state};"
            " free some space or choose another folder, then run the same command again."
        ) from refusal
    finally:
        if temporary is not None:
            _settle(temporary, path)


def _refusal(error: Exception) -> OSError | None:
    """Return the system's own error behind `error`: safetensors, torch and Pillow wrap it in theirs."""
    if isinstance(error, BunnyLoraError) and isinstance(error.__cause__, OSError):
        return error.__cause__  # of a file within a folder that is being written
    if isinstance(error, OSError) and error.errno is not None:
        return error
    text = str(error)
    if match := re.search(r"\(os error (\d+)\)", text):
        return OSError(int(match[1]), os.strerror(int(match[1])))
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        if os.strerror(number) in text:
            return OSError(number, os.strerror(number))
    return OSError(errno.EIO, text) if "when writing image file" in text else None


def _is_about(folder: Path, error: OSError) -> bool:
    """Whether the system refused to write in `folder` or to make it; a full disk names no file."""
    if error.errno is None:  # Raised by a library, as Pillow does for what is no image.
        return False
    if not isinstance(error.filename, str):
        return True
    named = Path(error.filename).absolute()
    return named.is_relative_to(folder) or folder.is_relative_to(named)


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it; a half-removed one is never seen under its name.

    It takes the name of a writer's temporary folder, for `recover`: on a full disk none could be made.

    Raises:
        BunnyLoraError: the system does not let it go.
    """
    gone = folder.with_name(f".{folder.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        folder.rename(gone)
    except OSError as error:
        raise BunnyLoraError(
            f"Could not remove {folder}: {error.strerror}. It is whole; see who may write in"
            f" {folder.parent}, or remove it yourself, then run the same command again."
        ) from error
    shutil.rmtree(gone, ignore_errors=True)


def recover(folder: Path) -> None:
    """Settle what writers that were killed have left in `folder` and below."""
    for temporary in sorted(folder.rglob(".*.tmp")):
        named = re.fullmatch(r"\.(.+)\.(\d+)\.[^.]+\.tmp", temporary.name)
        if named and temporary.is_dir() and not is_alive(int(named[2]), temporary):
            _settle(temporary, temporary.with_name(named[1]))


def is_alive(process: int, made: Path) -> bool:
    """Whether the process that made a file or folder runs; numbers are given again after its end."""
    try:
        return psutil.Process(process).create_time() <= made.stat().st_mtime + 1
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
    except psutil.AccessDenied:
        return True


def _settle(temporary: Path, path: Path) -> None:
    """Finish a replacement that was cut off between its two renames, then remove what is left."""
    old, part = temporary / OLD, temporary / path.name
    try:
        if old.exists() and not path.exists():
            (part if part.exists() else old).rename(path)
    except OSError:
        return  # Here lies the only copy.
    shutil.rmtree(temporary, ignore_errors=True)


def _swap(part: Path, path: Path) -> None:
    """Rename `part` to `path`; a folder cannot be renamed over another, so the old one steps aside.

    A process killed between the two renames leaves both in the temporary folder, for `recover`.
    """
    old = part.parent / OLD
    if path.is_dir():
        path.rename(old)
    try:
        part.replace(path)
    except OSError:
        if old.exists():
            with contextlib.suppress(OSError):
                old.rename(path)
        raise


def _fsync(path: Path) -> None:
    if os.name != "posix":  # Windows opens no folders, and flushes renames by itself.
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise


def _flush(path: Path) -> None:
    for item in [path, *path.rglob("*")]:  # Folders too: they hold the names of the files.
        _fsync(item)


def decoded(data: bytes) -> str:
    """Return text that people saved: UTF-8, or UTF-16 with its mark, as PowerShell's `>` writes it.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if utf_16 else "utf-8-sig")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write indented UTF-8 JSON atomically."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        BunnyLoraError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BunnyLoraError(f"Could not read {path}: {error}.") from error


def sha256(*paths: Path) -> str:
    """Return one hex digest over names and contents of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def is_inside(path: Path, folders: Sequence[Path]) -> bool:
    """Whether `path` really lies in one of the resolved `folders`, symlinks and `..` followed."""
    real = path.resolve()
    return any(real.is_relative_to(folder) for folder in folders)


def is_file(path: Path) -> bool:
    """Whether there is a file; False, not an error, for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether there is a folder; likewise."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
