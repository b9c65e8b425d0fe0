"""Drawing with the LoRA inside the weights and the VAE in a faster layout, for as long as it takes.

The sums are the same in another order, so a picture differs in single values of 255 from the one that
diffusers draws with the LoRA as an adapter. Small pictures are drawn several at once.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from peft.tuners.lora import LoraLayer

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

SMALL_PX = 256
"""Up to here a picture keeps its threads waiting for each other more than computing, see LOG.md."""
MAX_AT_ONCE = 4


def n_at_once(device: torch.device, side_px: int) -> int:
    """Return how many pictures of so many pixels a side are drawn at once, a thread each."""
    small = device.type == "cpu" and side_px <= SMALL_PX
    return min(torch.get_num_threads(), MAX_AT_ONCE) if small else 1


def twins(pipe: StableDiffusionPipeline, count: int) -> list[StableDiffusionPipeline]:
    """Return a pipeline and others with the same models, and with what keeps a state of their own."""
    found = [pipe]
    for _ in range(count - 1):
        twin = copy.copy(pipe)
        twin.scheduler, twin.tokenizer = copy.deepcopy((pipe.scheduler, pipe.tokenizer))
        found.append(twin)
    return found


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Have torch compute on so many threads, and on as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def prepared(pipe: StableDiffusionPipeline, lora_scale: float) -> Iterator[None]:
    """Have a pipeline draw faster; afterwards it is as it was, to the bit.

    Args:
        pipe: with or without LoRA layers of PEFT in UNet and text encoder.
        lora_scale: multiplies what these change.
    """
    decoder = pipe.vae.decoder
    with merged(pipe.unet, lora_scale), merged(pipe.text_encoder, lora_scale):
        decoder.to(memory_format=torch.channels_last)
        try:
            yield
        finally:
            decoder.to(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def merged(model: torch.nn.Module, scale: float) -> Iterator[None]:
    """Put plain layers in the place of PEFT's, with what these add to them in their weights.

    Nothing is computed twice as long as the context lasts; saving and export, outside of it, never see
    the merged weights. It takes a second copy of the layers that the LoRA changes.
    """
    with contextlib.ExitStack() as undo:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, LoraLayer):
                parent, _, child = name.rpartition(".")
                _replace(model.get_submodule(parent), child, layer, scale, undo)
        yield


def _replace(
    parent: torch.nn.Module, child: str, layer: LoraLayer, scale: float, undo: contextlib.ExitStack
) -> None:
    base = layer.get_base_layer()
    undo.callback(setattr, parent, child, layer)
    setattr(parent, child, base)
    if scale == 0 or layer.disable_adapters or layer.merged:
        return
    plain = base.weight.data
    undo.callback(setattr, base.weight, "data", plain)
    changes = [layer.get_delta_weight(name) for name in layer.active_adapters]
    base.weight.data = (plain + scale * sum(changes)).to(plain.dtype)
