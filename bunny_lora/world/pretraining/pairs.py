"""Pairs of captions for one noisy picture: what words change, taught without the noise.

The colour of eyes is a hundredth of what a picture's loss is made of, and many pictures did not teach
it. Two things are known without any chance, though. Where a caption names other eyes, the predicted
latents must move by what the latents of the same drawing with other eyes differ by; concept sliders
are taught by such pairs (https://arxiv.org/abs/2311.12092). And where a caption gives a regular's name
alone, it must predict what it predicts of the whole look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTokenizer

from bunny_lora.core.seeding import generator
from bunny_lora.model import components, diffusion
from bunny_lora.world import attributes
from bunny_lora.world.attributes import EYES, REGULAR_LOOKS, Picture, pick
from bunny_lora.world.captions import caption
from bunny_lora.world.pretraining.data import filled_rows, to_unit
from bunny_lora.world.pretraining.latents import encode, encoder_sha256
from bunny_lora.world.pretraining.lessons import lesson_picture
from bunny_lora.world.renderer import render_array

N_EYES, N_NAMES = 12, 10
"""Pairs of either kind in a step."""
EYES_WEIGHT, NAMES_WEIGHT = 0.4, 3.0
_LEAST_TIMESTEP = 350
"""Below it the noisy picture shows the eyes and clothes, and words say nothing new."""
_MOST_TRIES = 40


def with_other_eyes(picture: Picture, seed: int, index: int) -> Picture:
    """Return the picture at `index` of the stream, all the same but for the colour of eyes."""
    rng = attributes.generator(seed, "other eyes", index)
    people = [
        replace(c, traits=replace(c.traits, eyes=pick(rng, [e for e in EYES if e != c.traits.eyes])))
        for c in picture.characters
    ]
    return replace(picture, characters=tuple(people))


class _OtherEyes(Dataset[np.ndarray]):
    """Picture `index` of the denoiser's stream with other eyes, uint8 [3, size, size]."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size

    def __getitem__(self, index: int) -> np.ndarray:
        picture = with_other_eyes(lesson_picture(self.seed, index), self.seed, index)
        return render_array(picture, (self.size, self.size)).transpose(2, 0, 1).copy()


def eye_differences(
    out_dir: Path,
    vae_dir: Path,
    pictures: np.ndarray,
    latents: np.ndarray,
    *,
    seed: int = 0,
    device: str = "cpu",
    report: Callable[[str], None] = print,
) -> np.ndarray:
    """Return what latents differ by from those with other eyes, float16 [N, C, side, side].

    Zero where no eyes show, or more than one character. They lie memory-mapped in
    `out_dir/eyes.npy`; what is missing there is drawn and encoded.
    """
    vae = AutoencoderKL.from_pretrained(vae_dir).to(device)

    def blocks(first: int) -> Iterable[np.ndarray]:
        rest = range(first, len(pictures))
        others = _OtherEyes(seed, pictures.shape[-1])
        row = first
        for images in DataLoader(others, 50, sampler=rest):
            rows = slice(row, row + len(images))
            moved = latents[rows] - encode(vae, to_unit(images, device))
            same = (images.numpy() == pictures[rows, :3]).reshape(len(images), -1).all(1)
            several = [len(lesson_picture(seed, i).characters) > 1 for i in range(row, rows.stop)]
            moved[same | np.array(several)] = 0
            row = rows.stop
            yield moved

    key = {"seed": seed, "encoder": encoder_sha256(vae)}
    path = Path(out_dir) / "eyes.npy"
    return filled_rows(path, key, latents.shape, np.float16, blocks, report)


@dataclass(frozen=True)
class Pairs:
    """Pictures that pairs are made of, and what is known of them.

    Attributes:
        stream: seed of the denoiser's pictures.
        latents: of all pictures, float16 [N, C, side, side].
        differences: see `eye_differences`.
        with_eyes: numbers of the pictures that show eyes.
        regulars: numbers of the pictures that show one regular in the whole look.
    """

    stream: int
    latents: np.ndarray
    differences: np.ndarray
    with_eyes: np.ndarray
    regulars: np.ndarray

    @classmethod
    def of(cls, stream: int, latents: np.ndarray, differences: np.ndarray) -> Pairs:
        """Find out which pictures serve."""
        people = [lesson_picture(stream, index).characters for index in range(len(latents))]
        whole = [
            len(shown) == 1 and REGULAR_LOOKS.get(shown[0].name) == shown[0].traits for shown in people
        ]
        moved = np.abs(differences).reshape(len(differences), -1).max(axis=1) > 0
        return cls(stream, latents, differences, np.flatnonzero(moved), np.flatnonzero(whole))

    def loss(
        self,
        models: nn.ModuleDict,
        tokenizer: CLIPTokenizer,
        alphas_cumprod: torch.Tensor,
        seed: int,
        step: int,
    ) -> torch.Tensor:
        """Return the loss of a step's pairs of both kinds, drawn by lot.

        With v = a noise - s latents, and the noisy picture fixed, latents that move by d move v by
        -d / s.
        """
        lots, rng = attributes.generator(seed, "sd pairs", step), generator(seed, "sd pair noise", step)
        device = alphas_cumprod.device
        eyes, names = (
            lots.choice(of, n) for of, n in ((self.with_eyes, N_EYES), (self.regulars, N_NAMES))
        )
        told = [self._eyes_told(int(index), lots) for index in eyes]
        told += [self._name_told(int(index), lots) for index in names]
        firsts, seconds = zip(*told, strict=True)
        rows = np.concatenate([eyes, names])
        latents = torch.from_numpy(self.latents[rows]).float().to(device)
        moved = torch.from_numpy(self.differences[eyes]).float().to(device)
        noise = torch.randn(latents.shape, generator=rng).to(device)
        timesteps = torch.randint(_LEAST_TIMESTEP, len(alphas_cumprod), (len(rows),), generator=rng).to(
            device
        )
        noisy = diffusion.add_noise(latents, noise, timesteps, alphas_cumprod)

        with torch.autocast(device.type, torch.bfloat16):
            tokens = components.tokenize(tokenizer, [*firsts, *seconds]).to(device)
            states = models["text_encoder"](tokens).last_hidden_state
            first, second = (
                models["unet"](noisy, timesteps, part).sample.float() for part in states.chunk(2)
            )
        s = (1 - alphas_cumprod[timesteps[:N_EYES]]).sqrt().view(-1, 1, 1, 1)
        by_words = (first - second)[:N_EYES] * s
        eyes_loss = (by_words + moved).square().sum() / moved.square().sum()
        names_loss = (second[N_EYES:] - first[N_EYES:].detach()).square().mean()
        return EYES_WEIGHT * eyes_loss + NAMES_WEIGHT * names_loss

    def _eyes_told(self, index: int, lots: np.random.Generator) -> tuple[str, str]:
        """Return a caption that names the eyes, and the same with other eyes."""
        picture = lesson_picture(self.stream, index)
        other = with_other_eyes(picture, self.stream, index).characters[0].traits.eyes
        text = _told(picture, lots, eyes=True)
        eyes = picture.characters[0].traits.eyes
        return text, text.replace(f"{eyes} eyes", f"{other} eyes")

    def _name_told(self, index: int, lots: np.random.Generator) -> tuple[str, str]:
        """Return a caption with a regular's whole look, and one with the name alone."""
        picture = lesson_picture(self.stream, index)
        return _told(picture, lots, eyes=True), _told(picture, lots, eyes=False)


def _told(picture: Picture, lots: np.random.Generator, *, eyes: bool) -> str:
    """Return a caption of one character that names the eyes, or one that does not.

    Long captions lose their last parts, a look among them, and a regular's may go unsaid: so it tries.
    """
    word = f"{picture.characters[0].traits.eyes} eyes"
    for _ in range(_MOST_TRIES):
        text = caption(picture, int(lots.integers(2**31)), eyes_said=1.0)
        if (word in text) == eyes:
            break
    return text
