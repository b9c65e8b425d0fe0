"""An approximation: the largest attention to itself sees the mean of each square of tokens.

With keys and values averaged 2x2, attention at 64x64 has 1,024 keys instead of 4,096, and a quarter of
the work. Keys and values are linear in the tokens, so the tokens are averaged before. How far it moves
what is learnt hangs on model and pictures: `bunny-lora plan` measures it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch.nn.functional import avg_pool2d


class PooledAttnProcessor:
    """Hands averaged tokens to another processor, whose place it holds, as what is attended to.

    Args:
        inner: computes attention.
        factor: side of the squares, in tokens.
        sizes: height and width of latents by their product; only attention over as many tokens, the
            largest, is changed.
        size_hook: what writes sizes down.
    """

    def __init__(
        self, inner: Any, factor: int, sizes: dict[int, tuple[int, int]], size_hook: Any
    ) -> None:
        self.inner, self.factor, self.sizes, self.size_hook = inner, factor, sizes, size_hook

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Compute as diffusers' processors do; further arguments are theirs."""
        size = self.sizes.get(hidden_states.shape[1])
        if encoder_hidden_states is None and size is not None:
            encoder_hidden_states = averaged(hidden_states, size, self.factor)
        return self.inner(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def averaged(tokens: torch.Tensor, size: tuple[int, int], factor: int) -> torch.Tensor:
    """Return the mean of each square of tokens, at the edges of what is left of one.

    Args:
        tokens: [batch, height * width, features].
        size: height and width.
        factor: side of the squares.
    """
    maps = tokens.unflatten(1, size).movedim(-1, 1)
    means = avg_pool2d(maps, factor, ceil_mode=True, count_include_pad=False)
    return means.movedim(1, -1).flatten(1, 2)


def n_averaged(size: tuple[int, int], factor: int) -> int:
    """Return how many tokens `averaged` leaves."""
    return math.prod(-(-side // factor) for side in size)


def applies_to(unet: Any) -> bool:
    """Whether a UNet attends at the size of its latents."""
    return "CrossAttn" in unet.config.down_block_types[0]


def install(unet: torch.nn.Module, factor: int) -> None:
    """Have the largest attention to itself see averages, until `remove`; installed after the others."""
    remove(unet)
    sizes: dict[int, tuple[int, int]] = {}

    def note(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        height, width = args[0].shape[-2:]
        sizes[height * width] = (height, width)

    hook = unet.register_forward_pre_hook(note)
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and name.endswith(".attn1"):
            module.set_processor(PooledAttnProcessor(module.processor, factor, sizes, hook))


def remove(unet: torch.nn.Module) -> None:
    """Put back every processor that `install` took out."""
    for module in unet.modules():
        if isinstance(module, Attention) and isinstance(module.processor, PooledAttnProcessor):
            module.processor.size_hook.remove()
            module.set_processor(module.processor.inner)
