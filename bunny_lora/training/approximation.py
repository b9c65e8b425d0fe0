"""How far an approximation moves predictions and gradients, on the user's own model and pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from bunny_lora.model.fast import choice
from bunny_lora.training.setup import Setup

N_MICRO_BATCHES = 2


class Learnt(NamedTuple):
    """What micro-batches give: predictions, and gradients of the LoRA, each as one vector."""

    prediction: torch.Tensor
    gradient: torch.Tensor

    def moved_from(self, exact: Learnt) -> str:
        """Return in words by which share of its length each has moved."""
        prediction, gradient = (
            float((a - b).norm() / b.norm()) for a, b in zip(self, exact, strict=True)
        )
        return f"predictions by {prediction:.1%} and LoRA gradients by {gradient:.1%}"


def describe(run: Setup) -> str:
    """Return how far training.pooled_attention moves what is learnt, beside what its precision does.

    Nothing, where a run is exact. Both are measured on a LoRA that has learnt nothing yet, and the
    error of the precision with the same weights, computed with in float32.
    """
    factor, unet, path = (
        run.config.training.pooled_attention,
        run.parts.unet,
        choice.read(run.fast_path),
    )
    if factor is None:
        return ""
    approximate = _learnt(run)
    choice.install(unet, path)
    try:
        exact = _learnt(run)
        text = f"pooled_attention: {factor} moves {approximate.moved_from(exact)}"
        if run.parts.dtype != torch.float32:
            choice.remove(unet)
            with _in_float32(run):
                precise = _learnt(run)
            name = str(run.parts.dtype).removeprefix("torch.")
            text += f"; {name} itself, {exact.moved_from(precise)}"
    finally:
        choice.install(unet, path, factor)
    return text


def _learnt(run: Setup) -> Learnt:
    predictions: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: Any, output: Any) -> None:
        predictions.append(output.sample.detach().float().flatten())

    hook = run.parts.unet.register_forward_hook(keep)
    try:
        for number in range(N_MICRO_BATCHES):
            run.learner.loss(number * run.config.training.batch_size).backward()
    finally:
        hook.remove()
    gradients = [p.grad.flatten() for p in run.trainable() if p.grad is not None]
    run.state.optimizer.zero_grad()
    return Learnt(torch.cat(predictions), torch.cat(gradients))


@contextlib.contextmanager
def _in_float32(run: Setup) -> Iterator[None]:
    """Have the UNet compute in float32 with the weights as they are, which that holds to the bit."""
    unet, dtype, wanted = run.parts.unet, run.parts.dtype, run.config.training.gradient_checkpointing
    frozen = [parameter for parameter in unet.parameters() if parameter.dtype == dtype]

    def cast(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(x.float() if x.is_floating_point() else x for x in inputs)

    hook = unet.register_forward_pre_hook(cast)
    unet.enable_gradient_checkpointing()  # for the memory; the results are the same
    try:
        for parameter in frozen:
            parameter.data = parameter.data.float()
        yield
    finally:
        hook.remove()
        for parameter in frozen:
            parameter.data = parameter.data.to(dtype)
        if not wanted:
            unet.disable_gradient_checkpointing()
