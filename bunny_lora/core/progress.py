"""One progress bar for terminals, notebooks and log files, with an ETA from the whole run so far."""

from __future__ import annotations

import os
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

    Jupyter's servers name the notebook to the kernels that they start, VS Code and Colab leave their
    marks; papermill, nbclient and nbval start kernels that nobody looks at.
    `BUNNY_LORA_PROGRESS=widgets` says so of any other frontend, `lines` that nobody looks.
    """
    wanted = os.environ.get("BUNNY_LORA_PROGRESS")
    if not in_notebook() or wanted == "lines":
        return False
    names = sys.modules["IPython"].get_ipython().user_ns
    is_named = "JPY_SESSION_NAME" in os.environ or "__vsc_ipynb_file__" in names
    return is_named or "google.colab" in sys.modules or wanted == "widgets"


def progress(
    iterable: Iterable | None = None, *, desc: str, total: int | None = None, **kw: Any
) -> tqdm:
    """Return a tqdm bar: a widget in a notebook, a bar in a terminal, one line at times in a log.

    Under papermill nobody watches the notebook: with BUNNY_LORA_PROGRESS=lines it gets lines as well,
    which papermill can pass on while the cell runs.

    `smoothing=0` averages over all steps, because the last few seconds predict a run with pauses
    for samples and checkpoints badly.
    """
    kw = {"desc": desc, "total": total, "smoothing": 0, "dynamic_ncols": True} | kw
    kw["disable"] = kw.get("disable", False) or not ranks.is_main_process()
    if in_notebook() and os.environ.get("BUNNY_LORA_PROGRESS") != "lines":
        return tqdm_notebook(iterable, **kw)
    if sys.stderr.isatty():
        return tqdm(iterable, **kw)
    kw |= {"dynamic_ncols": False, "ncols": 100, "ascii": True, "mininterval": LINE_INTERVAL_SEC}
    return tqdm(iterable, file=_Lines(sys.stderr), maxinterval=LINE_INTERVAL_SEC, **kw)
