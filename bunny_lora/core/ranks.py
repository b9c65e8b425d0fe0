"""Which of the processes that were launched together this one is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


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
