"""Renders as tensors: the endless stream of pictures that the models of Bunny World learn from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bunny_lora.seeding import derive_seed
from bunny_lora.world.attributes import HEROES, Picture, hero_picture, random_picture
from bunny_lora.world.renderer import render


def heldout_seed(seed: int) -> int:
    """Return the seed of pictures that training under `seed` never sees."""
    return derive_seed(seed, "world held-out pictures")


class Renders(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Picture `index` of the random stream, with a map of where it matters.

    An item is the image, uint8 [3, size, size], and the weights, uint8 [1, size, size]: 1 for the
    background, 2 for a body, 4 for a face.
    """

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return as_tensors(random_picture(self.seed, index), self.size)


def as_tensors(picture: Picture, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a picture's image and weights as `Renders` gives them."""
    drawn = render(picture, (size, size))
    weight = np.ones((1, size, size), np.uint8)
    for value, boxes in ((2, drawn.bodies), (4, drawn.faces)):
        for x1, y1, x2, y2 in boxes:
            weight[:, y1:y2, x1:x2] = value
    image = np.array(drawn.image).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(image)), torch.from_numpy(weight)


def batches(
    renders: Renders, first: int, last: int, batch_size: int, n_workers: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the batches at positions `first` to `last` - 1 of the stream, as `Renders` items stacked.

    Batch i holds the pictures from i * `batch_size`, whoever draws them and wherever one starts.
    """
    indices = range(first * batch_size, last * batch_size)
    yield from DataLoader(renders, batch_size, sampler=indices, num_workers=n_workers)


def to_unit(images: torch.Tensor, device: str) -> torch.Tensor:
    """Return uint8 images as float32 from -1 to 1."""
    return images.to(device).float() / 127.5 - 1


def heldout(seed: int, size: int, n: int) -> torch.Tensor:
    """Return `n` random pictures that training never sees, uint8 [n, 3, size, size]."""
    renders = Renders(heldout_seed(seed), size)
    return torch.stack([renders[index][0] for index in range(n)])


def hero_images(seed: int, size: int, n_each: int) -> torch.Tensor:
    """Return `n_each` pictures of each hero, uint8 [4 * n_each, 3, size, size]."""
    pictures = [hero_picture([name], heldout_seed(seed), i) for name in HEROES for i in range(n_each)]
    return torch.stack([as_tensors(picture, size)[0] for picture in pictures])
