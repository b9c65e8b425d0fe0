"""The one exception that is a message to the user."""


class BunnyLoraError(Exception):
    """A mistake the user can mend: says what is wrong, where, and what to do.

    The command line prints the message alone and exits with status 2; a notebook shows the message
    without a traceback, through IPython's `_render_traceback_` hook. Anything else that is raised
    is a bug of ours and keeps its traceback.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]
