"""The random stream of pictures, encoded once, for the denoiser to learn from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from bunny_lora.world.pretraining.data import filled_rows, to_unit


def encoded_pictures(
    out_dir: Path,
    vae_dir: Path,
    pictures: np.ndarray,
    *,
    device: str = "cpu",
    batch_size: int = 25,
    report: Callable[[str], None] = print,
) -> np.ndarray:
    """Return `drawn_pictures` as scaled latents, float16 [n_pictures, 4, side, side].

    They lie memory-mapped in `out_dir/latents.npy`; what is missing there is encoded.
    """
    vae = AutoencoderKL.from_pretrained(vae_dir).to(device)
    side = pictures.shape[-1] // 8

    def blocks(first: int) -> Iterable[np.ndarray]:
        for row in range(first, len(pictures), batch_size):
            images = torch.from_numpy(pictures[row : row + batch_size, :3])
            yield encode(vae, to_unit(images, device))

    key = {"encoder": encoder_sha256(vae), "scaling_factor": vae.config.scaling_factor}
    shape = (len(pictures), vae.config.latent_channels, side, side)
    return filled_rows(Path(out_dir) / "latents.npy", key, shape, np.float16, blocks, report)


def encoder_sha256(vae: AutoencoderKL) -> str:
    """Return a digest of what latents depend on; a decoder that learned on leaves them as they are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> np.ndarray:
    """Return scaled latents, float16 [N, C, side, side], of images [N, 3, H, W] from -1 to 1."""
    with torch.autocast(images.device.type, torch.bfloat16):
        latents = vae.encode(images).latent_dist.mode()
    return (latents.float() * vae.config.scaling_factor).half().cpu().numpy()
