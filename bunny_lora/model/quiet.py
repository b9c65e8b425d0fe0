"""Our own calls into diffusers and transformers, without the log lines and bars meant for their users.

What they say by default is the host process's to decide, so nothing is set when this is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import transformers
from transformers.utils.logging import set_tqdm_hook

LOGS = (diffusers.utils.logging, transformers.utils.logging)


@contextmanager
def quiet() -> Iterator[None]:
    """Let diffusers and transformers tell of errors alone, and show no bars; also as a decorator."""
    levels = [log.get_verbosity() for log in LOGS]
    bars = diffusers.utils.logging.is_progress_bar_enabled()
    hook = set_tqdm_hook(_no_bar)  # Its switch for bars would switch off the hub's downloads too.
    for log in LOGS:
        log.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(LOGS, levels, strict=True):
            log.set_verbosity(level)
        if bars:
            diffusers.utils.logging.enable_progress_bar()
        set_tqdm_hook(hook)


def _no_bar(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return factory(*args, **kwargs | {"disable": True})
