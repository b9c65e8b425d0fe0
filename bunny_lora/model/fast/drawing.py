"""Drawing with the LoRA inside the weights and the VAE in a faster layout, for as long as it takes.

The sums are the same in another order, so a picture differs in single values of 255 from the one that
diffusers draws with the LoRA as an adapter. Large attention is computed by the native kernel where
that was faster; small pictures are drawn several at once.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer

from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import offload
from bunny_lora.model.fast import attention, native
from bunny_lora.model.fast.attention import Shape

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

SMALL_PX = 256
"""Up to here a picture keeps its threads waiting for each other more than computing, see LOG.md."""
MAX_AT_ONCE = 4
MANY_TOKENS = 1024


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
def prepared(
    pipe: StableDiffusionPipeline, lora_scale: float, width: int, height: int
) -> Iterator[None]:
    """Have a pipeline draw faster; afterwards it is as it was, to the bit.

    Args:
        pipe: with or without LoRA layers of PEFT in UNet and text encoder.
        lora_scale: multiplies what these change.
        width: of the pictures, pixels.
        height: likewise.
    """
    decoder, scale = pipe.vae.decoder, pipe.vae_scale_factor
    with merged(pipe.unet, lora_scale), merged(pipe.text_encoder, lora_scale):
        layout = contextlib.ExitStack()
        if offload.is_away(pipe.vae):  # It comes back, in its own layout, just before it is used.
            layout.callback(
                decoder.register_forward_pre_hook(lambda *_: _channels_last(decoder)).remove
            )
        else:
            _channels_last(decoder)
        if has_native_attention(pipe.unet):
            attention.install(pipe.unet, large_shapes(pipe.unet, height // scale, width // scale))
        try:
            yield
        finally:
            attention.remove(pipe.unet)
            layout.close()
            if not offload.is_away(pipe.vae):
                decoder.to(memory_format=torch.contiguous_format)


def _channels_last(decoder: Any) -> None:
    decoder.to(memory_format=torch.channels_last)


def has_native_attention(unet: UNet2DConditionModel) -> bool:
    """Whether large attention is faster by the native kernel: in bfloat16, with AVX512-BF16."""
    fits = unet.device.type == "cpu" and unet.dtype == torch.bfloat16
    return fits and torch.cpu._is_avx512_bf16_supported() and _is_built()


@functools.cache
def _is_built() -> bool:
    try:
        native.library()
    except BunnyLoraError:
        return False
    return True


def large_shapes(unet: UNet2DConditionModel, height: int, width: int) -> list[Shape]:
    """Return a UNet's attention to itself over many tokens, for latents of so many rows and columns."""
    channels = unet.config.block_out_channels
    heads = unet.config.num_attention_heads or unet.config.attention_head_dim
    heads = [heads] * len(channels) if isinstance(heads, int) else heads
    found = []
    for width_of_level, count in zip(channels, heads, strict=True):
        if height * width >= MANY_TOKENS:
            found.append(Shape(height * width, height * width, width_of_level // count))
        height, width = -(-height // 2), -(-width // 2)
    return found


@contextlib.contextmanager
def merged(model: torch.nn.Module, scale: float) -> Iterator[None]:
    """Put plain layers in the place of PEFT's, with what these add to them in their weights.

    Nothing is computed twice as long as the context lasts; saving and export, outside of it, never see
    the merged weights. It takes a second copy of the layers that the LoRA changes.
    """
    with contextlib.ExitStack() as undo:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, LoraLayer):
                offload.onload(model)
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
