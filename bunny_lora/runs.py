"""The project root, every path under it, atomic writes, and where a run came from.

All relative paths in a configuration start at the project root, never at the working folder:
papermill starts kernels in the caller's folder, nbval in the notebook's, and both must find the same
files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

import bunny_lora
from bunny_lora.errors import BunnyLoraError

PACKAGE_DIR = Path(__file__).resolve().parent
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "pillow")


def is_config_file(path: Path) -> bool:
    """Whether `path` is a YAML file with a `finetuning:` section at its top level."""
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    return any(line.startswith("finetuning:") for line in text.splitlines())


def project_root() -> Path:
    """Return the folder that relative paths start from.

    In this order: `BUNNY_LORA_ROOT`; the working folder if it holds a `config.yaml` of a host
    pipeline; the nearest folder above it with `params/` and `notebooks/`; the checkout this package
    was installed from; the working folder.
    """
    if override := os.environ.get("BUNNY_LORA_ROOT"):
        return Path(override).resolve()
    cwd = Path.cwd()
    if is_config_file(cwd / "config.yaml"):
        return cwd
    for folder in (cwd, *cwd.parents, PACKAGE_DIR.parent):
        if (folder / "params").is_dir() and (folder / "notebooks").is_dir():
            return folder
    return cwd


def resolve(path: str | Path) -> Path:
    """Return `path` as it is if absolute, else under the project root."""
    return project_root() / Path(path).expanduser()


def relative(path: Path) -> str:
    """Return `path` from the project root where it lies inside, for messages and provenance."""
    try:
        return path.resolve().relative_to(project_root()).as_posix()
    except ValueError:
        return path.name if path.is_relative_to(Path.home()) else str(path)


def demo_film_dir() -> Path:
    """Where the demo's own stage-4 run lies: one level too deep to be taken for a user's run."""
    return project_root() / "outputs" / "demo" / "film"


def has_user_data() -> bool:
    """Whether the user has a stage-4 run or prepared data of their own (the demo's never counts)."""
    root = project_root()
    prepared = root / "training_data" / "instance_images" / "metadata.jsonl"
    return prepared.is_file() or any(root.glob("outputs/*/llm_analysis/llm_analysis.json"))


def choose_params() -> tuple[Path | None, str]:
    """Return the configuration file that runs when none is named, and the reason for it.

    None means the built-in defaults: the package is installed without its `params/` folder.
    """
    root = project_root()
    if override := os.environ.get("BUNNY_LORA_PARAMS"):
        return resolve(override), "named by BUNNY_LORA_PARAMS"
    if is_config_file(Path.cwd() / "config.yaml"):
        return Path.cwd() / "config.yaml", "found in the working folder"
    if has_user_data():
        path, reason = root / "params" / "cpu.yaml", "found your own frames"
    else:
        path, reason = root / "params" / "demo.yaml", "no frames of your own yet, so the demo runs"
    return (path, reason) if path.is_file() else (None, f"built-in defaults, {path.name} not found")


def n_processes() -> int:
    """Return how many processes were launched together, this one included."""
    return _launched("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE") or 1


def is_main_process() -> bool:
    """Whether this is, of those, the one that writes and talks."""
    rank = _launched("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    return rank == 0 or n_processes() == 1


def _launched(*names: str) -> int:
    """Return what torchrun or MPI's launchers, in accelerate's order, have put into the environment."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), 0)


@contextlib.contextmanager
def quiet_unless_main() -> Iterator[None]:
    """Let only the main process print."""
    with contextlib.ExitStack() as stack:
        if not is_main_process():
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


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
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name}.{os.getpid()}."  # `recover` must know whose it was.
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=path.parent))
        yield temporary / path.name
        _flush(temporary / path.name)
        _swap(temporary / path.name, path)
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None or not _is_about(path.parent, refusal):
            raise
        raise BunnyLoraError(
            f"Could not write {path}: {refusal.strerror}. What was there before is untouched;"
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
    """Remove a folder with all that is in it; a half-removed one is never seen under its name."""
    prefix = f".{folder.name}.{os.getpid()}."
    temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=folder.parent))
    folder.rename(temporary / ".gone")
    shutil.rmtree(temporary, ignore_errors=True)


def recover(folder: Path) -> None:
    """Settle what writers that were killed have left in `folder` and below."""
    for temporary in sorted(folder.rglob(".*.tmp")):
        named = re.fullmatch(r"\.(.+)\.(\d+)\.[^.]+\.tmp", temporary.name)
        if named and temporary.is_dir() and not _is_alive(int(named[2]), temporary):
            _settle(temporary, temporary.with_name(named[1]))


def _is_alive(process: int, temporary: Path) -> bool:
    """Whether the process that made `temporary` still runs; numbers are given again after its end."""
    try:
        return psutil.Process(process).create_time() <= temporary.stat().st_mtime + 1
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
    except psutil.AccessDenied:
        return True


def _settle(temporary: Path, path: Path) -> None:
    """Finish a replacement that was cut off between its two renames, then remove what is left."""
    old, part = temporary / ".old", temporary / path.name
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
    old = part.parent / ".old"
    if path.is_dir():
        path.rename(old)
    try:
        part.replace(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    if os.name != "posix":  # Windows opens no folders, and flushes renames by itself.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    for item in [path, *path.rglob("*")]:  # Folders too: they hold the names of the files.
        _fsync(item)


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
    except (OSError, ValueError) as error:
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


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(PACKAGE_DIR), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance() -> dict[str, Any]:
    """Return what made this run: commit, dirty or not, versions, machine. No path, no secret."""
    # Installed into someone else's repository, say its .venv, we are not what git tracks there.
    tracked = _git("ls-files", "--error-unmatch", "runs.py") is not None
    status = _git("status", "--porcelain", "--untracked-files=no") if tracked else None
    return {
        "bunny_lora": bunny_lora.__version__,
        "commit": _git("rev-parse", "HEAD") if tracked else None,
        "dirty": None if status is None else bool(status),
        "python": sys.version.split()[0],
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "platform": f"{platform.system()} {platform.machine()}",
    }
