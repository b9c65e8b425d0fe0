"""What a run is asked for while it works: a file in its folder, which the run removes as it obeys.

Anybody who may write there can ask: a notebook's button, `bunny-lora watch --ask`, or `touch
RUN/stop.request` on a cluster.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Literal, get_args

from bunny_lora.core import files

Kind = Literal["stop", "save", "sample"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def ask(run_dir: Path, kind: Kind) -> None:
    """Leave a request in a run's folder; one that is there already is as good.

    Raises:
        BunnyLoraError: nothing can be written there.
    """
    by = {"process": os.getpid(), "computer": platform.node(), "at": time.strftime("%Y-%m-%d %H:%M:%S")}
    files.write_text(path_of(run_dir, kind), json.dumps(by) + "\n")


def path_of(run_dir: Path, kind: Kind) -> Path:
    """Return where a request lies until the run obeys it."""
    return run_dir / f"{kind}.request"


def pending(run_dir: Path) -> list[Kind]:
    """Return what is asked for, a stop last: what else was asked for is done before it."""
    found = [kind for kind in KINDS if path_of(run_dir, kind).exists()]
    return sorted(found, key=lambda kind: kind == "stop")


def withdraw(run_dir: Path, kind: Kind) -> None:
    """Remove a request, if it is there."""
    path_of(run_dir, kind).unlink(missing_ok=True)


def clear(run_dir: Path) -> list[Kind]:
    """Remove all requests and return what they were."""
    found = pending(run_dir)
    for kind in found:
        withdraw(run_dir, kind)
    return found
