"""From a configuration's source to training data on disk."""

from __future__ import annotations

from typing import Any

from bunny_lora import components, dataset, runs, stage4
from bunny_lora.config import Config


def prepare_data(config: Config, *, overwrite: bool = False) -> dict[str, Any]:
    """Write `config.data_dir` from `config.source` and return the summary, `data_summary.json`.

    Args:
        config: source, data_dir, min_confidence, instance_prompt and base_model (for its tokenizer)
            are read.
        overwrite: also where the prepared data was edited by hand; the edited folder is kept beside.

    Raises:
        BunnyLoraError: no source, nothing usable in it, or edited data would be replaced.
    """
    source = stage4.read_source(
        stage4.find_source(config.source),
        min_confidence=config.min_confidence,
        instance_prompt=config.instance_prompt,
    )
    tokenizer = components.load_tokenizer(config.base_model)
    return dataset.prepare(
        source, runs.resolve(config.data_dir), tokenizer=tokenizer, overwrite=overwrite
    )
