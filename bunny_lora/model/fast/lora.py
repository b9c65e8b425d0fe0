"""LoRA without casts: y = x·Wᵀ + (s·x·Aᵀ)·Bᵀ, all in the precision of x; A and B stay float32.

PEFT computes the second term in float32, on copies of x and y: at 4,096 tokens, these and what is
added up on them take as long as x·Wᵀ itself.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch.nn.functional import linear


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows, down, up = x.flatten(0, -2), a.to(x.dtype), (scale * b).to(x.dtype)
        narrow = rows @ down.t()
        out = linear(rows, weight, bias).addmm_(narrow, up.t())
        ctx.save_for_backward(rows, weight, narrow, down, up)
        ctx.scale = scale
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, narrow, down, up = ctx.saved_tensors
        g = grad.flatten(0, -2)
        narrow_grad = g @ up
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (g @ weight).addmm_(narrow_grad, down).unflatten(0, grad.shape[:-1])
        grad_a = (narrow_grad.t() @ rows).float()
        grad_b = (g.t() @ narrow).float() * ctx.scale
        return grad_x, None, None, grad_a, grad_b, None


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return x · weightᵀ + bias + scale · x · aᵀ · bᵀ; x, a and b get gradients.

    Args:
        x: [..., in], float32 or bfloat16.
        weight: [out, in], frozen, as x.
        bias: [out], frozen, as x; or None.
        a: [rank, in], float32, as its gradient.
        b: [out, rank], float32, as its gradient.
        scale: alpha / rank.
    """
    return _LoRALinear.apply(x, weight, bias, a, b, scale)


def _forward(layer: Linear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if layer.disable_adapters or layer.merged or args or kwargs:
        return Linear.forward(layer, x, *args, **kwargs)
    (name,), base = layer.active_adapters, layer.base_layer
    a, b = layer.lora_A[name], layer.lora_B[name].weight
    if a._forward_hooks:  # They scale each sample, and only PEFT calls A.
        return Linear.forward(layer, x)
    return lora_linear(x, base.weight, base.bias, a.weight, b, layer.scaling[name])


def install(unet: torch.nn.Module) -> None:
    """Let every LoRA layer that is nothing but the formula above compute it so, until `remove`.

    Batches whose samples have LoRA scales of their own are left to PEFT, see `model.lora_scales`.
    """
    for layer in unet.modules():
        if type(layer) is Linear and _is_plain(layer):
            layer.forward = functools.partial(_forward, layer)


def remove(unet: torch.nn.Module) -> None:
    """Have every LoRA layer compute as PEFT does."""
    for layer in unet.modules():
        if type(layer) is Linear:
            layer.__dict__.pop("forward", None)


def _is_plain(layer: Linear) -> bool:
    names = layer.active_adapters
    extras = layer.lora_variant or layer.fan_in_fan_out or any(layer.lora_bias.values())
    dropout = any(isinstance(x, torch.nn.Dropout) and x.p for x in layer.lora_dropout.values())
    return len(names) == 1 and names[0] in layer.lora_A and not extras and not dropout
