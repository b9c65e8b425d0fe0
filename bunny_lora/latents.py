"""Encode every training image once, keep the result on disk, and draw batches from it by position.

A frozen VAE gives the same latents in every epoch, and on a CPU it costs about as much as a training
step; so each image is encoded once, as mean and standard deviation, and each sample is drawn from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from bunny_lora import runs
from bunny_lora.components import encode_images
from bunny_lora.dataset import ImageDataset, sample_indices
from bunny_lora.progress import progress
from bunny_lora.seeding import generator


@dataclass(frozen=True)
class Batch:
    """One micro-batch, everything random in it drawn from (seed, purpose, position).

    `latents` and `noise` are float32 [N, 4, h, w], `timesteps` int64 [N], `captions` N strings.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    captions: list[str]


@dataclass(frozen=True)
class EncodedImages:
    """A data set as latent distributions, with its captions.

    `moments[i][flipped]` is float32 [2, 4, H/8, W/8]: mean and standard deviation. `stream` names the
    random numbers, so that training and class images do not share theirs.
    """

    moments: list[list[torch.Tensor]]
    captions: list[str]
    latent_size: int
    stream: str

    def batch(self, seed: int, position: int, count: int, num_train_timesteps: int) -> Batch:
        """Return samples `position` to `position + count` of the endless training stream."""
        drawn = [
            self._draw(seed, position + offset, index, num_train_timesteps)
            for offset, index in enumerate(sample_indices(seed, len(self.captions), position, count))
        ]
        latents, noise, timesteps, captions = zip(*drawn, strict=True)
        return Batch(torch.stack(latents), torch.stack(noise), torch.stack(timesteps), list(captions))

    def _draw(self, seed: int, position: int, index: int, num_train_timesteps: int) -> tuple:
        random = generator(seed, f"{self.stream} sample", position)
        variants = self.moments[index]
        mean, std = variants[int(torch.randint(len(variants), (), generator=random))]
        latents = mean + std * torch.randn(mean.shape, generator=random)
        latents = self._crop(latents, random)
        noise = torch.randn(latents.shape, generator=random)
        timestep = torch.randint(num_train_timesteps, (), generator=random)
        return latents, noise, timestep, self.captions[index]

    def _crop(self, latents: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        """Cut a random square out of latents of the whole frame; a centre crop is one already."""
        top, left = (
            int(torch.randint(side - self.latent_size + 1, (), generator=random))
            for side in latents.shape[1:]
        )
        return latents[:, top : top + self.latent_size, left : left + self.latent_size]


class _Variants(Dataset):
    """The images of a data set, each plain and, if asked, mirrored: [3, H, W] in [-1, 1]."""

    def __init__(self, images: ImageDataset, flips: int) -> None:
        self.images, self.flips = images, flips

    def __len__(self) -> int:
        return len(self.images) * self.flips

    def __getitem__(self, item: int) -> torch.Tensor:
        pixel_values = self.images[item // self.flips]
        return pixel_values.flip(-1) if item % self.flips else pixel_values


def encode_dataset(
    vae: AutoencoderKL,
    images: ImageDataset,
    captions: Sequence[str],
    cache_dir: Path,
    *,
    random_flip: bool = False,
    num_workers: int = 0,
    pin_memory: bool = False,
    stream: str = "training",
) -> EncodedImages:
    """Return the latents of a data set, from the disk if they are there already.

    Args:
        vae: frozen; its weights and dtype are part of the cache's key.
        images: what to encode; the files' bytes and the crop are part of the key.
        captions: one an image, in the images' order.
        cache_dir: holds one safetensors file a key; it may be deleted at any time.
        random_flip: encode the mirror images too.
        num_workers: processes that decode images, as in torch's `DataLoader`.
        pin_memory: as in torch's `DataLoader`; speeds up copies to a GPU.
        stream: names the random numbers that samples are drawn with.
    """
    flips = 2 if random_flip else 1
    path = cache_dir / f"{_key(vae, images, flips)}.safetensors"
    if not path.is_file():
        loader = DataLoader(
            _Variants(images, flips), batch_size=None, num_workers=num_workers, pin_memory=pin_memory
        )
        bar = progress(_encode_each(vae, loader), desc="encode images", total=len(images) * flips)
        tensors = {f"{i:06d}": moments for i, moments in enumerate(bar)}
        with runs.atomic_path(path) as part:
            save_file(tensors, part)
    tensors = load_file(path)
    flat = [tensors[f"{i:06d}"] for i in range(len(images) * flips)]
    moments = [flat[i : i + flips] for i in range(0, len(flat), flips)]
    return EncodedImages(moments, list(captions), images.resolution // 8, stream)


def _encode_each(vae: AutoencoderKL, loader: DataLoader) -> Iterator[torch.Tensor]:
    # Halves the time on a CPU. Only here: pictures are drawn with the layout that diffusers loads, so
    # that they come out the same to the bit with diffusers alone.
    vae.to(memory_format=torch.channels_last)
    for pixel_values in loader:
        mean, std = encode_images(vae, pixel_values[None])
        yield torch.cat([mean, std]).cpu().contiguous()
    vae.to(memory_format=torch.contiguous_format)


def _key(vae: AutoencoderKL, images: ImageDataset, flips: int) -> str:
    digest = hashlib.sha256(runs.sha256(*images.paths).encode())
    digest.update(f"{images.resolution}/{images.center_crop}/{flips}/{vae.dtype}".encode())
    digest.update(str(vae.config.scaling_factor).encode())
    for name, tensor in vae.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
