"""One progress bar for terminals, notebooks and log files, with an ETA from the whole run so far."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.notebook import tqdm_notebook

from bunny_lora.core import ranks

LINE_INTERVAL_SEC = 30.0


class _Lines:
    """A text stream that turns the bar's carriage returns into lines, so that logs stay readable."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self.stream.write(text.strip("\r\n") + "\n")

    def flush(self) -> None:
        self.stream.flush()


def in_notebook() -> bool:
    """Whether this code runs inside a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def is_watched() -> bool:
    """Whether this is a notebook that a person has open, so that widgets live.

    Papermill, nbval and nbconvert ask a kernel through jupyter_client, which numbers its requests;
    JupyterLab, VS Code and Colab name theirs at random. `BUNNY_LORA_PROGRESS=widgets` says somebody
    looks, `lines` that nobody does.
    """
    wanted = os.environ.get("BUNNY_LORA_PROGRESS")
    if not in_notebook() or wanted in ("lines", "widgets"):
        return in_notebook() and wanted == "widgets"
    request = sys.modules["IPython"].get_ipython().kernel.get_parent().get("header", {})
    return re.fullmatch(r".+_\d+_\d+", request.get("msg_id", "")) is None


def progress(
    iterable: Iterable | None = None, *, desc: str, total: int | None = None, **kw: Any
) -> tqdm:
    """Return a tqdm bar: a widget in a notebook, a bar in a terminal, one line at times elsewhere.

    In a notebook that nobody watches the lines are output like any other, which papermill passes on
    while the cell runs; in a log they stand beside warnings, in stderr.

    `smoothing=0` averages over all steps, because the last few seconds predict a run with pauses
    for samples and checkpoints badly.
    """
    kw = {"desc": desc, "total": total, "smoothing": 0, "dynamic_ncols": True} | kw
    kw["disable"] = kw.get("disable", False) or not ranks.is_main_process()
    if is_watched():
        return tqdm_notebook(iterable, **kw)
    if sys.stderr.isatty() and not in_notebook():
        return tqdm(iterable, **kw)
    kw |= {"dynamic_ncols": False, "ncols": 100, "ascii": True, "mininterval": LINE_INTERVAL_SEC}
    lines = _Lines(sys.stdout if in_notebook() else sys.stderr)
    return tqdm(iterable, file=lines, maxinterval=LINE_INTERVAL_SEC, **kw)
