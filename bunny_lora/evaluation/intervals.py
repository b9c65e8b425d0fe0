"""Intervals of scores whose images come in groups, one a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bunny_lora.core.eval_parts import Interval
from bunny_lora.evaluation.traits import clustered_interval

MIN_PROMPTS = 3


def prompt_interval(values: torch.Tensor, clusters: Sequence[object]) -> Interval:
    """Return the mean of scores [N] with its interval over prompts; of one or two prompts over images.

    With fewer than three prompts the interval is of these prompts alone, and says nothing of others.

    Args:
        values: one of each image; NaNs are left out, and not all are NaN.
        clusters: of each image what makes it like others beside its seed.
    """
    several = len(set(clusters)) >= MIN_PROMPTS
    return clustered_interval(values, clusters if several else range(len(values)))


def is_above_zero(values: torch.Tensor, clusters: Sequence[object]) -> bool:
    """Whether scores are more than 0 by more than chance."""
    found = prompt_interval(values, clusters)
    return found.low is not None and found.low > 0
