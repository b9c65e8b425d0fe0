"""Pretrain the autoencoder: pictures to 4 channels at an eighth of their side, and back.

The picture at every position is a function of the seed and the position, so a run that goes on from
its last state ends in the same weights as one that was never interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from bunny_lora.runs import atomic_path
from bunny_lora.seeding import derive_seed, generator
from bunny_lora.world.learner import Learner, learning_rate
from bunny_lora.world.pretrain_data import Renders, batches, heldout, hero_images, to_unit

CHANNELS = (24, 48, 96, 128)
_KL_WEIGHT = 1e-4


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


def picture_loss(output: torch.Tensor, images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return how far `output` is from `images`, both float32 [N, 3, H, W] from -1 to 1.

    L1 on pixels, on their differences to the neighbours (edges: outlines, eyes) and on two coarser
    scales, weighted by `weight` [N, 1, H, W], which makes faces count.
    """
    error = output - images
    weight = weight / weight.mean()
    pixels = (weight * error.abs()).mean()
    across = (weight[..., 1:] * (error[..., 1:] - error[..., :-1]).abs()).mean()
    down = (weight[..., 1:, :] * (error[..., 1:, :] - error[..., :-1, :]).abs()).mean()
    coarse = F.avg_pool2d(error, 4).abs().mean() + F.avg_pool2d(error, 16).abs().mean()
    return pixels + 0.5 * (across + down) + 0.25 * coarse


def _loss(vae: AutoencoderKL, batch: list[torch.Tensor], noise: torch.Generator) -> torch.Tensor:
    images, weight = batch
    with torch.autocast(images.device.type, torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        sample = torch.randn(posterior.mean.shape, generator=noise).to(images.device)
        output = vae.decode(posterior.mean + posterior.std * sample).sample
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return picture_loss(output.float(), images, weight) + _KL_WEIGHT * kl


def pretrain_vae(
    out_dir: Path,
    *,
    max_steps: int = 20_000,
    batch_size: int = 8,
    peak_rate: float = 6e-4,
    size: int = 128,
    channels: tuple[int, ...] = CHANNELS,
    seed: int = 0,
    device: str = "cpu",
    n_workers: int = 0,
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
        n_workers: processes that draw pictures; on a GPU one process cannot keep up.
        n_heldout: pictures to measure the quality on, and as many of heroes.
        report: receives a line of progress at every evaluation.

    Raises:
        BunnyLoraError: the state in `out_dir` was made under other settings.
    """
    out_dir = Path(out_dir)
    state = out_dir / "vae_state.safetensors"
    vae = build_vae(size, channels, seed).to(device)
    settings = {"size": size, "channels": list(channels), "seed": seed, "batch_size": batch_size}
    learner = Learner(vae, settings | {"max_steps": max_steps, "peak_rate": peak_rate})
    learner.load(state)
    last = min(max_steps, stop_at or max_steps)
    losses: list[float] = []
    since, first = time.monotonic(), learner.step
    for images, weight in batches(Renders(seed, size), learner.step, last, batch_size, n_workers):
        batch = [to_unit(images, device), weight.to(device).float()]
        noise = generator(seed, "world vae noise", learner.step)
        loss = _loss(vae, batch, noise)
        learner.update(loss, learning_rate(learner.step, max_steps, peak_rate))
        losses.append(float(loss.detach()))

        # once in a while
        if learner.step % save_every == 0 or learner.step == last:
            learner.save(state)
        if learner.step % evaluate_every == 0 or learner.step == last:
            speed = (learner.step - first) * batch_size / (time.monotonic() - since)
            with learner.averaged():
                pictures = heldout(seed, size, n_heldout)
                heroes = hero_images(seed, size, n_heldout // 4)
                quality = f"PSNR {psnr(vae, pictures):.2f} dB, on heroes {psnr(vae, heroes):.2f} dB"
                export_vae(vae, out_dir / "vae", pictures)
            mean_loss = sum(losses) / len(losses)
            report(f"step {learner.step}: loss {mean_loss:.4f}, {quality}, {speed:.1f} images/s")
            losses, since, first = [], time.monotonic(), learner.step
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
    """Write the autoencoder in diffusers' format, its scaling factor measured on uint8 `images`."""
    pictures = to_unit(images, str(vae.device)).split(16)
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in pictures])
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    with atomic_path(folder) as part:
        vae.save_pretrained(part)
