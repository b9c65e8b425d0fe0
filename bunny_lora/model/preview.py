"""A small decoder in the place of a model's own, for pictures that are looked at and not kept.

TAESD, https://github.com/madebyollin/taesd: a distilled autoencoder for the latents of Stable Diffusion
1.x, softer than the model's own in fine detail.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderTiny

from bunny_lora.core import paths
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import hub
from bunny_lora.model.quiet import quiet

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

LATENT_CHANNELS, SCALE = 4, 8


@functools.lru_cache(maxsize=1)
@quiet()
def load_decoder(name: str, dtype: torch.dtype, device: torch.device) -> AutoencoderTiny:
    """Load a decoder of TAESD's kind, in safetensors, from a folder or the hub.

    Raises:
        BunnyLoraError: there is none of that name here or on the hub, or it is for other latents.
    """
    folder = paths.resolve(name)
    try:
        folder = folder if folder.is_dir() else hub.local_decoder(name)
        decoder = AutoencoderTiny.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, BunnyLoraError) as error:
        raise BunnyLoraError(
            f"sampling.preview_decoder: {name} could not be loaded as a decoder of TAESD's kind:"
            f" {str(error).strip().splitlines()[0][:200]} Name a folder or a hub repository in"
            " diffusers' layout, such as madebyollin/taesd, or null."
        ) from error
    size = 2 ** (len(decoder.config.decoder_block_out_channels) - 1)
    if (decoder.config.latent_channels, size) != (LATENT_CHANNELS, SCALE):
        raise BunnyLoraError(
            f"sampling.preview_decoder: {name} is for latents of {decoder.config.latent_channels}"
            f" channels and 1/{size} of a picture's side, and Stable Diffusion 1.x has"
            f" {LATENT_CHANNELS} and 1/{SCALE}: name madebyollin/taesd, or null."
        )
    return decoder.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)


@contextlib.contextmanager
def used(pipe: StableDiffusionPipeline, name: str | None) -> Iterator[None]:
    """Have a pipeline decode with `load_decoder`, and with its own again afterwards; None: its own."""
    own = pipe.vae
    if name is not None:
        pipe.vae = load_decoder(name, own.dtype, own.device)
    try:
        yield
    finally:
        pipe.vae = own
