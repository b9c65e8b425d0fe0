"""Ctrl-C, SIGTERM, a closed terminal and the notebook's stop button, where they can do no harm.

While `watch` is active, such a signal takes effect only inside `stoppable` blocks: there it raises
`StopRequest` at once, everywhere else it waits for the next such block. So computing is dropped in the
middle, and an update of the weights or a write to the disk never is.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from bunny_lora.errors import BunnyLoraError

NAMES = {
    "SIGINT": "Ctrl-C or the stop button",
    "SIGTERM": "a request to end (SIGTERM)",
    "SIGHUP": "a closed terminal",
}


class StopRequest(KeyboardInterrupt):
    """Raised inside a `stoppable` block; carries the number of the signal."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number


class StoppedError(BunnyLoraError):
    """The run was stopped from outside and is in good order; the message says where it goes on."""

    def __init__(self, message: str, number: int, by: str | None = None) -> None:
        super().__init__(f"Stopped by {by or NAMES[signal.Signals(number).name]}. {message}")
        self.exit_code = 128 + number


@dataclass
class _Watch:
    received: int | None = None
    raised: bool = False
    depth: int = 0  # of stoppable blocks

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if self.depth:
            self.stop()

    def stop(self) -> None:
        if self.received and not self.raised:
            self.raised = True  # Once: what it sets going, a last save, is not to be stopped.
            raise StopRequest(self.received)


_watch: _Watch | None = None


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """Take charge of the signals that stop a process, in the main thread; elsewhere do nothing.

    Raises:
        StoppedError: a stop came, and nobody inside has said what became of the work.
    """
    global _watch
    if _watch is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    taken = {n: handler for n, handler in before.items() if handler is not signal.SIG_IGN}  # As nohup.
    current = _watch = _Watch()
    try:
        for number in taken:
            signal.signal(number, current.on_signal)
        yield
        current.stop()
    except StopRequest as stop:
        message = "Nothing was lost: the same command goes on from here."
        raise StoppedError(message, stop.number) from None
    finally:
        _watch = None
        for number, handler in taken.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """A stretch of work that may be dropped anywhere."""
    current = _watch or _Watch()
    current.stop()
    current.depth += 1
    try:
        yield
    finally:
        current.depth -= 1
