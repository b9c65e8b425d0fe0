"""Renders as tensors: the pictures that the models of Bunny World learn from, drawn once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch.utils.data import DataLoader, Dataset

from bunny_lora.core.files import read_json, write_json
from bunny_lora.core.seeding import derive_seed
from bunny_lora.model import components
from bunny_lora.world.attributes import HEROES, Picture, hero_picture, random_picture
from bunny_lora.world.renderer import render

N_PICTURES = 60_000
_BLOCK = 50
_SAVE_EVERY = 20


def made_or_shipped(out_dir: Path, name: str) -> Path:
    """Return the folder of a model, "clip" or "sd/vae": made in `out_dir`, or else as shipped."""
    made = out_dir / Path(name).name
    return made if made.is_dir() else components.WORLD_WEIGHTS / name


def heldout_seed(seed: int) -> int:
    """Return the seed of pictures that training under `seed` never sees."""
    return derive_seed(seed, "world held-out pictures")


def as_rows(picture: Picture, size: int) -> np.ndarray:
    """Return a picture as uint8 [4, size, size]: red, green, blue, and a map of where it matters.

    The map is 1 for the background, 2 for a body, 3 for a face.
    """
    drawn = render(picture, (size, size))
    weight = np.ones((1, size, size), np.uint8)
    for value, boxes in ((2, drawn.bodies), (3, drawn.faces)):
        for x1, y1, x2, y2 in boxes:
            weight[:, y1:y2, x1:x2] = value
    return np.concatenate([np.array(drawn.image).transpose(2, 0, 1), weight])


def random_rows(seed: int, index: int, size: int) -> np.ndarray:
    """Return picture `index` of the random stream, as `as_rows` gives it."""
    return as_rows(random_picture(seed, index), size)


class _Drawn(Dataset[np.ndarray]):
    """Picture `index` of a stream, as `draw` gives it."""

    def __init__(self, draw: Callable[[int, int, int], np.ndarray], seed: int, size: int) -> None:
        self.draw, self.seed, self.size = draw, seed, size

    def __getitem__(self, index: int) -> np.ndarray:
        return self.draw(self.seed, index, self.size)


def filled_rows(
    path: Path,
    key: Mapping[str, Any],
    shape: tuple[int, ...],
    dtype: type[np.generic],
    blocks: Callable[[int], Iterable[np.ndarray]],
    report: Callable[[str], None] = print,
) -> np.ndarray:
    """Return the array of `shape` that lies memory-mapped in `path`; fill in what is missing.

    `blocks(n)` yields the rows from row n on, a few at a time. Goes on where an interruption left off,
    and starts anew for another `key`.
    """
    progress = path.with_suffix(".json")
    known = read_json(progress) if progress.is_file() and path.is_file() else {}
    key = dict(key) | {"shape": list(shape)}
    done = known["n_rows_done"] if known | key == known else 0
    rows = open_memmap(path, "r+" if done else "w+", None if done else dtype, None if done else shape)
    if done == len(rows):
        return rows
    for index, block in enumerate(blocks(done), start=1):
        rows[done : done + len(block)] = block
        done += len(block)
        if index % _SAVE_EVERY == 0 or done == len(rows):
            rows.flush()
            write_json(progress, key | {"n_rows_done": done})
            report(f"{path.stem}: {done} of {len(rows)}")
    return rows


def drawn_pictures(
    out_dir: Path,
    n_pictures: int,
    *,
    size: int = 128,
    seed: int = 0,
    n_workers: int = 0,
    report: Callable[[str], None] = print,
    draw: Callable[[int, int, int], np.ndarray] = random_rows,
    name: str = "pictures",
) -> np.ndarray:
    """Return a stream of pictures as uint8 [n_pictures, 4, size, size], see `as_rows`.

    The pictures lie memory-mapped in `out_dir/<name>.npy`, the random ones shared by all models; what
    is missing there is drawn, by `draw(seed, index, size)`. Row i is picture i.
    """
    Path(out_dir).mkdir(parents=True, exist_ok=True)

    def blocks(first: int) -> Iterable[np.ndarray]:
        rest = range(first, n_pictures)
        loader = DataLoader(_Drawn(draw, seed, size), _BLOCK, sampler=rest, num_workers=n_workers)
        return (block.numpy() for block in loader)

    shape = (n_pictures, 4, size, size)
    return filled_rows(Path(out_dir) / f"{name}.npy", {"seed": seed}, shape, np.uint8, blocks, report)


def to_unit(images: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    """Return uint8 images as float32 from -1 to 1."""
    return images.to(device).float() / 127.5 - 1


def heldout(seed: int, size: int, n: int) -> torch.Tensor:
    """Return `n` random pictures that training never sees, uint8 [n, 3, size, size]."""
    return _images([random_picture(heldout_seed(seed), index) for index in range(n)], size)


def hero_images(seed: int, size: int, n_each: int) -> torch.Tensor:
    """Return `n_each` pictures of each hero, uint8 [4 * n_each, 3, size, size]."""
    pictures = [hero_picture([name], heldout_seed(seed), i) for name in HEROES for i in range(n_each)]
    return _images(pictures, size)


def _images(pictures: list[Picture], size: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([as_rows(picture, size)[:3] for picture in pictures]))
