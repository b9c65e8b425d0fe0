"""Where a run came from: commit, versions, machine."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from typing import Any

import bunny_lora
from bunny_lora.core.paths import PACKAGE_DIR

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "pillow")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(PACKAGE_DIR), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance() -> dict[str, Any]:
    """Return what made this run: commit, dirty or not, versions, machine. No path, no secret."""
    # Installed into someone else's repository, say its .venv, we are not what git tracks there.
    tracked = _git("ls-files", "--error-unmatch", "errors.py") is not None
    status = _git("status", "--porcelain", "--untracked-files=no") if tracked else None
    return {
        "bunny_lora": bunny_lora.__version__,
        "commit": _git("rev-parse", "HEAD") if tracked else None,
        "dirty": None if status is None else bool(status),
        "python": sys.version.split()[0],
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "platform": f"{platform.system()} {platform.machine()}",
    }
