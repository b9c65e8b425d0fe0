"""The project root, every path under it, and which configuration lies there.

All relative paths in a configuration start at the project root, never at the working folder:
papermill starts kernels in the caller's folder, nbval in the notebook's, and both must find the same
files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bunny_lora.errors import BunnyLoraError

PACKAGE_DIR = Path(__file__).resolve().parents[1]


def is_config_file(path: Path) -> bool:
    """Whether `path` is a YAML file with a `finetuning:` section at its top level."""
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    return any(line.startswith("finetuning:") for line in text.splitlines())


def host_config(folder: Path) -> Path | None:
    """Return the `config.yaml` of the host pipeline whose folder this is, or None.

    A run's folder holds a `config.yaml` too, but is nobody's root: ours has what is written beside it.
    """
    path = folder / "config.yaml"
    is_run = (folder / "provenance.json").is_file() and any(
        (folder / name).is_file() for name in ("config.input.yaml", "log.jsonl")
    )
    return path if is_config_file(path) and not is_run else None


def project_root() -> Path:
    """Return the folder that relative paths start from.

    In this order: `BUNNY_LORA_ROOT`; the working folder if it holds a `config.yaml` of a host
    pipeline; the nearest folder above it with `params/` and `notebooks/`; the checkout this package
    was installed from; the working folder.
    """
    if override := os.environ.get("BUNNY_LORA_ROOT"):
        return Path(override).resolve()
    cwd = Path.cwd()
    if host_config(cwd):
        return cwd
    for folder in (cwd, *cwd.parents, PACKAGE_DIR.parent):
        if (folder / "params").is_dir() and (folder / "notebooks").is_dir():
            return folder
    return cwd


def home() -> Path | None:
    """Return the user's home folder; None where the system knows none, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def expanded(path: str | Path) -> Path:
    """Return a path with a leading `~` or `~name` put in words.

    Raises:
        BunnyLoraError: nobody knows that home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise BunnyLoraError(
            f"{path} starts with a home folder that this system does not know: write the path in full."
        ) from None


def resolve(path: str | Path) -> Path:
    """Return `path` as it is if absolute, else under the project root."""
    return project_root() / expanded(path)


def typed(path: str | Path) -> Path:
    """Return what a path typed in a shell names: from the working folder, else the project root."""
    here = expanded(path).absolute()
    at_root = resolve(path)
    return at_root if at_root.exists() and not here.exists() else here


def new(path: str | Path) -> Path:
    """Return what a path typed in a shell names that is to be written: from the working folder."""
    return expanded(path).absolute()


def typed_or_name(text: str) -> str:
    """Return the path of what is there under a typed name, or the name itself: of a model, of a run."""
    path = typed(text)
    return str(path) if path.exists() else text


def relative(path: Path) -> str:
    """Return `path` from the project root where it lies inside, for messages and provenance."""
    try:
        return path.resolve().relative_to(project_root()).as_posix()
    except ValueError:
        at_home = (folder := home()) and path.is_relative_to(folder)
        return path.name if at_home else str(path)


def demo_film_dir() -> Path:
    """Where the demo's own stage-4 run lies: one level too deep to be taken for a user's run."""
    return project_root() / "outputs" / "demo" / "film"


def has_user_data() -> bool:
    """Whether the user has a stage-4 run or prepared data of their own (the demo's never counts)."""
    root = project_root()
    prepared = is_own_data(root / "training_data" / "instance_images")
    return prepared or any(root.glob("outputs/*/llm_analysis/llm_analysis.json"))


def is_own_data(folder: Path) -> bool:
    """Whether somebody's own training data lie in a folder: anything that is not the demo's."""
    if not folder.is_dir() or all(path.name.startswith(".") for path in folder.iterdir()):
        return False
    try:
        summary = json.loads((folder.parent / "data_summary.json").read_text(encoding="utf-8"))
        return summary["source"] != relative(demo_film_dir())
    except (OSError, ValueError, TypeError, KeyError):
        return True


def choose_params(named: Mapping[str, Any] | None = None) -> tuple[Path | None, str]:
    """Return the configuration file that runs when none is named, and the reason for it.

    None means the built-in defaults: the package is installed without its `params/` folder.

    Args:
        named: what goes over the file; of it, `source` and `data_dir` tell whose frames are meant.
    """
    root, named = project_root(), named or {}
    source, data_dir = (str(named.get(key) or "") for key in ("source", "data_dir"))
    if override := os.environ.get("BUNNY_LORA_PARAMS"):
        return resolve(override), "named by BUNNY_LORA_PARAMS"
    if path := host_config(Path.cwd()):
        return path, "found in the working folder"
    if source == "bunny-world":
        path, reason = root / "params" / "demo.yaml", "the demo's film is named as the source"
    elif source not in ("", "auto"):
        path, reason = root / "params" / "cpu.yaml", "you named a source of your own"
    elif data_dir and is_own_data(resolve(data_dir)):
        path, reason = root / "params" / "cpu.yaml", "you named training data of your own"
    elif has_user_data():
        path, reason = root / "params" / "cpu.yaml", "found your own frames"
    else:
        path, reason = root / "params" / "demo.yaml", "no frames of your own yet, so the demo runs"
    return (path, reason) if path.is_file() else (None, f"built-in defaults, {path.name} not found")
