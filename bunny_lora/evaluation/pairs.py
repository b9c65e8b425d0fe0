"""How two runs differ on the same pictures: same prompt, same seed, one of each."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bunny_lora.core.eval_result import EvalResult, ImageScores, Interval
from bunny_lora.evaluation.intervals import prompt_interval

Key = tuple[str, str, int]
N_LEAST = 2  # pairs


def differences(first: EvalResult, other: EvalResult) -> dict[str, Interval]:
    """Return what the LoRA of `other` scores more than that of `first`, with intervals over prompts.

    By name of the measure: those that both runs have of each picture, by the same features. Pictures
    that only one of them has are left out; of fewer than two pairs nothing is returned.
    """
    same = first.settings.features == other.settings.features
    values: dict[str, Callable[[EvalResult, ImageScores], float | None]] = {}
    if first.traits and other.traits and first.traits.counted == other.traits.counted:
        values["traits read right"] = _right
    if first.identity and other.identity and first.identity.features == other.identity.features:
        values[f"identity by {first.identity.features}"] = lambda _, image: image.identity
    if first.following and other.following and first.following.features == other.following.features:
        values[f"as asked by {first.following.features}"] = lambda _, image: image.following
    if same:
        values[f"fidelity by {first.settings.features}"] = lambda _, image: image.fidelity
    found = {}
    for name, value in values.items():
        before, after = _values(first, value), _values(other, value)
        keys = [key for key in before if key in after]
        if len(keys) >= N_LEAST:
            changes = torch.tensor([after[key] - before[key] for key in keys])
            found[name] = prompt_interval(changes, [key[:2] for key in keys])
    return found


def _values(
    result: EvalResult, value: Callable[[EvalResult, ImageScores], float | None]
) -> dict[Key, float]:
    found: dict[Key, float] = {}
    for image in result.images:
        if image.model == "final" and (known := value(result, image)) is not None:
            found[image.character, image.prompt, image.seed] = known
    return found


def _right(result: EvalResult, image: ImageScores) -> float | None:
    """Return the share of a picture's traits that were read right; None where nothing was read."""
    traits = result.traits.traits.get(image.character, {}) if result.traits else {}
    hits = [image.read[t] == score.answer for t, score in traits.items() if t in image.read]
    return sum(hits) / len(hits) if hits else None
