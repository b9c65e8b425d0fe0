"""What is wrong with a configuration, in words: one line for one mistake."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from bunny_lora.core.values import MAX_SHOWN, shown

# What other trainers call our keys, where the spelling alone would suggest another key.
OTHER_NAMES = {
    "max_steps": "training.max_train_steps",
    "lr": "training.learning_rate",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "train_batch_size": "training.batch_size",
    "pretrained_model_name_or_path": "base_model",
}


def explain(item: Any, known_keys: Sequence[str]) -> str:
    """Return where and what is wrong by one of pydantic's errors; an unknown key names the nearest."""
    location = [str(part)[:MAX_SHOWN] for part in item["loc"]]
    if item["type"] == "extra_forbidden":
        return f"{'.'.join(location)}: unknown key{_nearest(location, known_keys)}"
    message = item["msg"].removeprefix("Value error, ")
    if not location:
        return message
    given = "" if item["type"] == "value_error" else f" (got {shown(item['input'])})"
    return f"{'.'.join(location)}: {message}{given}"


def _nearest(location: list[str], known_keys: Sequence[str]) -> str:
    dotted, leaf = ".".join(location), location[-1]
    if leaf in OTHER_NAMES:
        return f"; did you mean {OTHER_NAMES[leaf]}?"
    same_leaf = [key for key in known_keys if key.split(".")[-1] == leaf]
    by_leaf = {key.split(".")[-1]: key for key in known_keys}
    near = difflib.get_close_matches(dotted, known_keys, 1, 0.6)
    near_leaf = [by_leaf[key] for key in difflib.get_close_matches(leaf, by_leaf, 1, 0.6)]
    candidates = same_leaf or near or near_leaf
    return f"; did you mean {candidates[0]}?" if candidates else ""
