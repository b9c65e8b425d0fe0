"""Attention of a UNet through the native kernel: put in for training, taken out for all else."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from bunny_lora.model.fast import native


class Shape(NamedTuple):
    """What the time of one head's attention hangs on."""

    queries: int
    keys: int
    features: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


N_WORDS = 77
"""Tokens of a caption."""


def is_known(found: Shape, shapes: Collection[Shape]) -> bool:
    """Whether an attention is one of those that were tried on square pictures, or that of a wide one.

    A picture of another shape has about the square's area, and the next level a quarter of it.
    """
    return any(
        found.features == shape.features
        and (found.keys == N_WORDS) == (shape.keys == N_WORDS)
        and 0.5 < found.queries / shape.queries < 2
        and 0.5 < found.keys / shape.keys < 2
        for shape in shapes
    )


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = map(_dense, (query, key, value))
        out, sums = native.forward(query, key, value)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value, out, sums = ctx.saved_tensors
        return native.backward(query, key, value, out, sums, _dense(grad))


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return what torch's `scaled_dot_product_attention` returns, by the native kernel.

    Args:
        query: [batch, heads, tokens, features], float32 or bfloat16 on a CPU.
        key: likewise, of as many tokens as `value`.
        value: likewise.
    """
    return _NativeAttention.apply(query, key, value)


class NativeAttnProcessor:
    """Does as diffusers' `AttnProcessor2_0`, whose place it holds, for the shapes that it is given."""

    def __init__(self, plain: AttnProcessor2_0, shapes: Collection[Shape]) -> None:
        self.plain, self.shapes = plain, shapes

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Compute as diffusers' processors do; further arguments are theirs."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        features = attn.inner_dim // attn.heads
        plain = hidden_states.ndim != 3 or attention_mask is not None
        if plain or not is_known(
            Shape(hidden_states.shape[1], context.shape[1], features), self.shapes
        ):
            return self.plain(
                attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs
            )
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, features)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        mixed = attention(query, key, value).transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            mixed = layer(mixed)
        return mixed / attn.rescale_output_factor


def install(unet: torch.nn.Module, shapes: Collection[Shape]) -> None:
    """Let attention of these shapes be computed by the native kernel, until `remove`."""
    remove(unet)
    for module in unet.modules():
        if shapes and isinstance(module, Attention) and _is_plain(module):
            module.set_processor(NativeAttnProcessor(module.processor, shapes))


def remove(unet: torch.nn.Module) -> None:
    """Put back every processor that `install` took out."""
    for module in unet.modules():
        if isinstance(module, Attention) and isinstance(module.processor, NativeAttnProcessor):
            module.set_processor(module.processor.plain)


def _is_plain(attn: Attention) -> bool:
    """Whether there is nothing in it that the native path leaves out."""
    extras = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
    return type(attn.processor) is AttnProcessor2_0 and not attn.residual_connection and not any(extras)
