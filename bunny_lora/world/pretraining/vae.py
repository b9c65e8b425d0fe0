"""Pretrain the autoencoder: pictures to 4 channels at an eighth of their side, and back.

The picture at every position is a function of the seed and the position, so a run that goes on from
its last state ends in the same weights as one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from bunny_lora.core.files import atomic_path
from bunny_lora.core.seeding import derive_seed, generator
from bunny_lora.model import components
from bunny_lora.world import attributes
from bunny_lora.world.pretraining.data import N_PICTURES, drawn_pictures, heldout, hero_images, to_unit
from bunny_lora.world.pretraining.learner import TrainState, take_up

CHANNELS = (16, 32, 64, 128)
_KL_WEIGHT = 1e-5


def build_vae(size: int = 128, channels: tuple[int, ...] = CHANNELS, seed: int = 0) -> AutoencoderKL:
    """Return an untrained autoencoder for `size` x `size` pictures, 4 latent channels, factor 8."""
    n_blocks = len(channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "world vae weights"))
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * n_blocks,
            up_block_types=("UpDecoderBlock2D",) * n_blocks,
            block_out_channels=channels,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=size,
        )


def crops(pictures: np.ndarray, crop: int, n: int, rng: np.random.Generator) -> torch.Tensor:
    """Return `n` squares of `crop` pixels from the rows [N, 4, H, W], uint8 [n, 4, crop, crop].

    Every second one lies around a point of a character, where there is most to learn.
    """
    squares = []
    for number, index in enumerate(rng.integers(len(pictures), size=n)):
        rows = pictures[index]
        points = np.argwhere(rows[3] > number % 2)
        middle = points[rng.integers(len(points))] if len(points) else (0, 0)
        top, left = np.clip(np.array(middle) - crop // 2, 0, rows.shape[-1] - crop)
        squares.append(rows[:, top : top + crop, left : left + crop])
    return torch.from_numpy(np.stack(squares))


def channels_exchanged(rows: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Return rows [N, 4, H, W] with the colour channels of every fourth one in another order.

    Heroes wear colours that no random picture has, and an autoencoder that knows only those blotches
    them.
    """
    rows = rows.clone()
    for index in range(0, len(rows), 4):
        rows[index, :3] = rows[index, torch.from_numpy(rng.permutation(3))]
    return rows


def _loss(vae: AutoencoderKL, rows: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    images, weight = to_unit(rows[:, :3], str(rows.device)), 0.5 + 0.5 * rows[:, 3:].float()
    with torch.autocast(images.device.type, torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        sample = torch.randn(posterior.mean.shape, generator=noise).to(images.device)
        output = vae.decode(posterior.mean + posterior.std * sample).sample
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    error = (weight * (output.float() - images).square()).sum() / (3 * weight.sum())
    return error + _KL_WEIGHT * kl


def _take_up_decoder(vae: AutoencoderKL, folder: Path) -> str:
    """Fill in an earlier training's weights, all but the decoder to stay; return a hash of them."""
    digest = take_up(vae, folder)
    nn.ModuleList([vae.encoder, vae.quant_conv]).requires_grad_(False)
    vae.register_to_config(scaling_factor=AutoencoderKL.load_config(folder)["scaling_factor"])
    return digest


def pretrain_vae(
    out_dir: Path,
    *,
    max_steps: int = 14_000,
    batch_size: int = 2,
    peak_rate: float = 3e-3,
    n_pictures: int = N_PICTURES,
    size: int = 128,
    channels: tuple[int, ...] = CHANNELS,
    seed: int = 0,
    device: str = "cpu",
    n_workers: int = 0,
    start_from: Path | None = None,
    stop_at: int | None = None,
    evaluate_every: int = 500,
    save_every: int = 250,
    n_heldout: int = 64,
    report: Callable[[str], None] = print,
) -> Path:
    """Train the autoencoder, or go on training it, and return the folder of its averaged weights.

    Args:
        out_dir: holds `vae_state.safetensors`, to go on from, and `vae/`, in diffusers' format.
        max_steps: length of the whole training; the learning rate ends at 0 there.
        stop_at: stop at this step already, as an interruption would.
        batch_size: whole pictures a step, or as much in squares of half the side.
        n_pictures: pictures of the random stream to draw and learn from.
        n_workers: processes that draw pictures.
        start_from: an autoencoder that an earlier training left, whose decoder is to learn on, from
            other pictures. Its encoder stays, and so do the latents that denoisers have learned from.
        n_heldout: pictures to measure the quality on, and as many of heroes.
        report: receives a line of progress at every evaluation.

    Raises:
        BunnyLoraError: the state in `out_dir` was made under other settings, or `start_from` is of
            another shape.
    """
    out_dir = Path(out_dir)
    pictures = drawn_pictures(
        out_dir, n_pictures, size=size, seed=seed, n_workers=n_workers, report=report
    )
    vae = build_vae(size, channels, seed).to(device)
    settings: dict[str, Any] = {"size": size, "channels": list(channels), "n_pictures": n_pictures}
    settings |= {"seed": seed, "batch_size": batch_size, "peak_rate": peak_rate, "max_steps": max_steps}
    own_seed, n_in_squares = seed, 0.8 * max_steps
    if start_from is not None:
        settings["start_from"] = origin = _take_up_decoder(vae, start_from)
        own_seed, n_in_squares = derive_seed(seed, f"world vae from {origin}"), 0
    state = TrainState(vae, settings)

    def loss_of(step: int) -> torch.Tensor:
        # squares teach more a second than whole pictures, which come last and set the statistics right
        n_squares = 2 if step < n_in_squares else 1
        rng = attributes.generator(own_seed, "vae batch", step)
        rows = crops(pictures, size // n_squares, batch_size * n_squares**2, rng)
        if step >= max_steps // 4:
            rows = channels_exchanged(rows, rng)
        return _loss(vae, rows.to(device), generator(own_seed, "world vae noise", step))

    for progress in state.train(
        loss_of,
        out_dir / "vae_state.safetensors",
        max_steps=max_steps,
        peak_rate=peak_rate,
        images_per_step=batch_size,
        evaluate_every=evaluate_every,
        save_every=save_every,
        stop_at=stop_at,
    ):
        with state.averaged():
            unseen = heldout(seed, size, n_heldout)
            heroes = hero_images(seed, size, n_heldout // 4)
            quality = f"PSNR {psnr(vae, unseen):.2f} dB, on heroes {psnr(vae, heroes):.2f} dB"
            export_vae(vae, out_dir / "vae", unseen)
        quality = f"loss {progress.mean_loss:.4f}, {quality}"
        report(f"step {state.step}: {quality}, {progress.images_per_sec:.1f} images/s")
    return out_dir / "vae"


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Return uint8 images [N, 3, H, W] encoded and decoded again, without noise."""
    outputs = []
    for chunk in images.split(16):
        latents = vae.encode(to_unit(chunk, str(vae.device))).latent_dist.mode()
        outputs.append(vae.decode(latents).sample.clamp(-1, 1).cpu())
    return ((torch.cat(outputs) + 1) * 127.5).round().to(torch.uint8)


def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Return the mean peak signal-to-noise ratio of uint8 images through the autoencoder, in dB."""
    difference = (reconstruct(vae, images).float() - images.float()) / 255
    errors = difference.square().flatten(1).mean(1).clamp(min=1e-10)
    return float((-10 * errors.log10()).mean())


@torch.no_grad()
def export_vae(vae: AutoencoderKL, folder: Path, images: torch.Tensor) -> None:
    """Write the autoencoder in diffusers' format.

    Its scaling factor is measured on uint8 `images`, unless its encoder is not in training.
    """
    if vae.encoder.conv_in.weight.requires_grad:
        pictures = to_unit(images, str(vae.device)).split(16)
        latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in pictures])
        vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    with atomic_path(folder) as part:
        components.save_model(vae, part)
