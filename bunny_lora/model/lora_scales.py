"""How much LoRA counts while the model predicts: for a whole batch, or for each sample of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer


@contextlib.contextmanager
def lora_scales(models: Iterable[PeftModel], scales: Sequence[float]) -> Iterator[None]:
    """Have LoRA count as much for each sample as is said, until the end of the block.

    One batch for all scales costs what one for a single scale does; one for each costs more, the
    smaller the model.

    Args:
        models: the UNet and the text encoder with their LoRA.
        scales: one for each of the samples that they are to be given at once; 0: without the LoRA,
            1: as it is.
    """
    with contextlib.ExitStack() as scaled:
        for model in models:
            if len(set(scales)) > 1:
                scaled.enter_context(_each_at_its_own(model, scales))
            elif scales[0] == 0:
                scaled.enter_context(model.disable_adapter())
            elif scales[0] != 1:
                scaled.enter_context(rescale_adapter_scale(model, scales[0]))
        yield


@contextlib.contextmanager
def _each_at_its_own(model: PeftModel, scales: Sequence[float]) -> Iterator[None]:
    """Scale what comes out of each A, the narrowest place, where the first dimension is the sample."""

    def scale(layer: torch.nn.Module, inputs: object, narrow: torch.Tensor) -> torch.Tensor:
        factors = torch.tensor(scales, dtype=narrow.dtype, device=narrow.device)
        return narrow * factors.view(-1, *[1] * (narrow.ndim - 1))

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    hooks = [a.register_forward_hook(scale) for layer in layers for a in layer.lora_A.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
