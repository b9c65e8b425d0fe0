"""The one exception that is a message to the user."""


class BunnyLoraError(Exception):
    """A mistake the user can mend: says what is wrong, where, and what to do.

    The command line prints the message alone and exits with status 2; a notebook shows the message
    without a traceback, through IPython's `_render_traceback_` hook. Anything else that is raised
    is a bug of ours and keeps its traceback.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class FollowerError(BunnyLoraError):
    """In a process that helps another one: that one has stopped over such a mistake, and says so."""


class LostProcessError(BunnyLoraError):
    """Another process of the run has gone, and nothing can be computed without it."""

    def __init__(self, reason: object, advice: str = "Start all of them again.") -> None:
        self.reason = reason
        closed = any(word in str(reason) for word in ("closed", "reset"))
        noticed = "it closed its connections" if closed else "it gives no sign of life"
        super().__init__(
            f"Another process of this run has ended or cannot be reached: {noticed}. If it had"
            f" something to say, it has said it. {advice}"
        )


class LeftOutError(Exception):
    """Why one picture is not used: `kind: detail`; the kind is what the summary counts."""
