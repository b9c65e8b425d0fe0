"""What a step learns from: pictures as latents, with all that is random in how they are seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """One micro-batch, everything random in it drawn from (seed, purpose, position).

    `latents` and `noise` are float32 [N, 4, h, w], `timesteps` int64 [N], `captions` N strings. `mask`
    is float32 [N, 1, h, w], 0 where nothing is to be learnt; None: nowhere.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    captions: list[str]
    mask: torch.Tensor | None = None

    @staticmethod
    def joined(batches: Sequence[Batch]) -> Batch:
        """Return all samples of several batches of one size as one."""
        masks = [batch.mask for batch in batches]
        if any(mask is not None for mask in masks):
            ones = [torch.ones_like(batch.latents[:, :1]) for batch in batches]
            masks = [one if mask is None else mask for mask, one in zip(masks, ones, strict=True)]
        return Batch(
            torch.cat([batch.latents for batch in batches]),
            torch.cat([batch.noise for batch in batches]),
            torch.cat([batch.timesteps for batch in batches]),
            [caption for batch in batches for caption in batch.captions],
            None if masks[0] is None else torch.cat([mask for mask in masks if mask is not None]),
        )
