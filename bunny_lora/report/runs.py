"""Runs as the pages read them: whatever is missing or damaged is said, and the rest is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from bunny_lora.config import Config, load_config
from bunny_lora.core import choice as choice_file
from bunny_lora.core import eval_result, paths
from bunny_lora.core.choice import Choice
from bunny_lora.core.eval_result import EvalResult
from bunny_lora.core.image_file import read_metadata
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import adapters
from bunny_lora.training.log import LOG

T = TypeVar("T")


@dataclass
class Run:
    """What a run's folder holds, as far as it can be read; `said` explains what cannot."""

    folder: Path
    config: Config | None = None
    result: EvalResult | None = None
    choice: Choice | None = None
    said: dict[str, str] = field(default_factory=dict)
    _digests: dict[str, str | None] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run.

        Raises:
            BunnyLoraError: it is no run at all.
        """
        if not any((folder / name).exists() for name in ("config.yaml", LOG, "final", "evaluation")):
            raise BunnyLoraError(
                f"{folder} is no run: there is neither config.yaml nor {LOG} nor final/ in it. Name the"
                " folder of a run, such as outputs/lora_weights."
            )
        run = cls(folder)
        run.config = run.attempt("config", lambda: load_config(folder / "config.yaml"))
        run.result = run.attempt("evaluation", lambda: eval_result.find(folder))
        run.choice = run.attempt("choice", lambda: choice_file.find(folder))
        return run

    def attempt(self, what: str, read: Callable[[], T]) -> T | None:
        """Return what `read` does, or None where it cannot; why is kept, without the root's path."""
        try:
            return read()
        except BunnyLoraError as error:
            self.said[what] = str(error).replace(f"{paths.project_root()}/", "")
            return None

    def digest(self, model: str) -> str | None:
        """Return the digest of the weights that lie there now under a model's name."""
        if model not in self._digests:
            self._digests[model] = adapters.adapter_digest(self.folder / model)
        return self._digests[model]

    def is_stale(self, model: str, picture: Path) -> bool:
        """Whether a picture says that other weights drew it than the model's name stands for now."""
        if model == "base" or (now := self.digest(model)) is None:
            return False
        drawn = (read_metadata(picture) or {}).get("weights_sha256")
        return drawn is not None and drawn != now
