"""The random stream of pictures, encoded once, for the denoiser to learn from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.lib.format import open_memmap

from bunny_lora.errors import BunnyLoraError
from bunny_lora.runs import read_json, sha256, write_json
from bunny_lora.world.pretrain_data import Renders, batches, to_unit

_SAVE_EVERY = 20


def encoded_pictures(
    out_dir: Path,
    vae_dir: Path,
    n_pictures: int,
    *,
    seed: int = 0,
    device: str = "cpu",
    n_workers: int = 0,
    batch_size: int = 16,
    report: Callable[[str], None] = print,
) -> np.ndarray:
    """Return the stream as scaled latents, float16 [n_pictures, 4, side, side]; encode what is missing.

    They lie memory-mapped in `out_dir/latents.npy`; row i is picture i. Goes on where an interruption
    left off, and starts anew for another autoencoder, seed or number of pictures.

    Raises:
        BunnyLoraError: there is no autoencoder in `vae_dir`.
    """
    if not (Path(vae_dir) / "config.json").is_file():
        raise BunnyLoraError(
            f"No autoencoder in {vae_dir}: pretrain the vae first, with the same --out."
        )
    vae = AutoencoderKL.from_pretrained(vae_dir).to(device)
    size, side = vae.config.sample_size, vae.config.sample_size // 8
    path, progress = Path(out_dir) / "latents.npy", Path(out_dir) / "latents.json"
    weights = sha256(Path(vae_dir) / "diffusion_pytorch_model.safetensors")
    key = {"vae": weights, "seed": seed, "n_pictures": n_pictures, "batch_size": batch_size}
    known = read_json(progress) if progress.is_file() and path.is_file() else {}
    done = known["n_batches_done"] if known | key == known else 0
    shape = (n_pictures, vae.config.latent_channels, side, side)
    latents = open_memmap(path, "r+" if done else "w+", np.float16, None if done else shape)
    last = -(-n_pictures // batch_size)
    stream = batches(Renders(seed, size), done, last, batch_size, n_workers)
    for index, (images, _) in enumerate(stream, start=done):
        rows = slice(index * batch_size, min((index + 1) * batch_size, n_pictures))
        latents[rows] = _encode(vae, to_unit(images, device))[: rows.stop - rows.start]
        if (index + 1) % _SAVE_EVERY == 0 or index + 1 == last:
            latents.flush()
            write_json(progress, key | {"n_batches_done": index + 1})
            report(f"encoded {rows.stop} of {n_pictures} pictures")
    return latents


@torch.no_grad()
def _encode(vae: AutoencoderKL, images: torch.Tensor) -> np.ndarray:
    with torch.autocast(images.device.type, torch.bfloat16):
        latents = vae.encode(images).latent_dist.mode()
    return (latents.float() * vae.config.scaling_factor).half().cpu().numpy()
