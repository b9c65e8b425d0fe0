"""Which configuration runs: the same answer for the command line and for the notebooks."""

from __future__ import annotations

import ast
import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bunny_lora import config as configuration
from bunny_lora.config import Config
from bunny_lora.core import paths
from bunny_lora.core.progress import in_notebook
from bunny_lora.errors import BunnyLoraError

# Short names that notebooks and the command line give to keys of the configuration.
SHORT_NAMES = {
    "max_steps": "training.max_train_steps",
    "seed": "training.seed",
    "resume": "resume",
    "output_dir": "output_dir",
    "data_dir": "data_dir",
    "source": "source",
    "min_confidence": "min_confidence",
}


def open_config(
    config_path: str | Path | None = None,
    finetuning: Mapping[str, Any] | None = None,
    settings: list[str] | None = None,
    **named: Any,
) -> Config:
    """Return the configuration that is to run, and say in one line which it is and why.

    Args:
        config_path: a YAML file, from the working folder or the project root. None: `finetuning`
            alone if it is given, else the project's choice, see `runs.choose_params`.
        finetuning: a whole or partial `finetuning:` section, laid over the file.
        settings: `key=value` lines as `--set` takes them.
        **named: values by their short names (`SHORT_NAMES`); None leaves the key alone.

    Raises:
        BunnyLoraError: wrong keys or values, or a papermill parameter that the notebook does not have.
    """
    if in_notebook():
        reject_unknown_parameters()
    overrides = copy.deepcopy(dict(finetuning or {}))
    for name, value in named.items():
        if value is not None:
            text = str(value) if isinstance(value, Path) else value
            configuration.set_key(overrides, SHORT_NAMES[name], text)
    for assignment in settings or []:
        configuration.assign(overrides, assignment)
    path, reason = _choose(config_path, finetuning, overrides)
    config = configuration.load_config(path, overrides)
    print(f"Configuration: {paths.relative(path) if path else 'no file'} ({reason})")
    return config


def _choose(
    config_path: str | Path | None, finetuning: object, overrides: Mapping[str, Any]
) -> tuple[Path | None, str]:
    if config_path is not None:
        return paths.typed(config_path), "named by you"
    if finetuning is not None:
        return None, "the `finetuning` parameter over the defaults"
    return paths.choose_params(overrides)


def models_of(config: Config) -> list[str]:
    """Return every model that a configuration names: of the base, and what looks at pictures."""
    evaluation = config.evaluation
    encoders = (config.face_encoder, evaluation.features, evaluation.prompt_features)
    named = [name for name in encoders if name and name != "palette"]
    return list(dict.fromkeys([config.base_model, *named]))


def reject_unknown_parameters() -> None:
    """Raise BunnyLoraError if papermill injected a name that the `parameters` cell does not have.

    papermill only warns about those, so that a typing error trains for two days with the default.
    """
    cells = sys.modules["IPython"].get_ipython().user_ns["In"]
    injected = [i for i, source in enumerate(cells) if source.startswith("# Parameters\n")]
    if not injected:
        return
    known = set().union(*(_assigned(source) for source in cells[: injected[0]]))
    if unknown := _assigned(cells[injected[0]]) - known:
        raise BunnyLoraError(
            f"Unknown parameter{'s' * (len(unknown) > 1)}: {', '.join(sorted(unknown))}."
            f" This notebook takes: {', '.join(sorted(known))}."
        )


def _assigned(source: str) -> set[str]:
    targets = [
        t for node in ast.parse(source).body if isinstance(node, ast.Assign) for t in node.targets
    ]
    return {target.id for target in targets if isinstance(target, ast.Name)}
