"""From a configuration's source to training data on disk."""

from __future__ import annotations

from typing import Any

from bunny_lora import dataset, stage4
from bunny_lora.config import Config
from bunny_lora.data import frames, writing
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import components

SETTINGS = ("source", "min_confidence", "instance_prompt", "allow_outside_paths", "base_model")
"""What prepared data depend on, `base_model` for its tokenizer."""


def prepare_data(config: Config, *, overwrite: bool = False) -> dict[str, Any]:
    """Write `config.data_dir` from `config.source` and return the summary, `data_summary.json`.

    Args:
        config: source, data_dir, min_confidence, instance_prompt, allow_outside_paths and base_model
            (for its tokenizer) are read.
        overwrite: also where the prepared data was edited by hand; the edited folder is kept beside.

    Raises:
        BunnyLoraError: no source, nothing usable in it, or edited data would be replaced.
    """
    tokenizer = components.load_tokenizer(config.base_model)
    return writing.prepare(_read(config), config.data_path, tokenizer=tokenizer, overwrite=overwrite)


def source_changed(config: Config) -> bool:
    """Whether `config.source` is there and says something else than when the data was prepared."""
    summary = dataset.load_summary(config.data_path)
    if summary is None:
        return False
    try:
        return _read(config).digest != summary["input_sha256"]
    except BunnyLoraError:
        return False  # Gone or moved: what was prepared from it is enough.


def _read(config: Config) -> frames.Source:
    return stage4.read_source(
        stage4.find_source(config.source),
        min_confidence=config.min_confidence,
        instance_prompt=config.instance_prompt,
        allow_outside_paths=config.allow_outside_paths,
    )
