"""Which pictures make which batch: of one size each, by position alone.

In an era, as many batches as pictures come in an epoch, each size has as many batches as it has
pictures, in an order of its own; so each picture is seen as often as any, and none is filled up or cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from bunny_lora.core import seeding
from bunny_lora.dataset import sample_indices

Size = tuple[int, int]


def bucketed_indices(
    seed: int, pictures: Mapping[Size, Sequence[int]], position: int, count: int
) -> tuple[Size, list[int]]:
    """Return the size of the batch at a position of the sample stream, and which pictures are in it.

    A pure function of the arguments, as `sample_indices`.

    Args:
        seed: of the run.
        pictures: the pictures of each size, each as often as it comes in an epoch.
        position: of the batch's first sample, a multiple of `count`.
        count: samples a batch.
    """
    sizes = [size for size in sorted(pictures) for _ in pictures[size]]
    era, place = divmod(position // count, len(sizes))
    order = torch.randperm(len(sizes), generator=seeding.generator(seed, "buckets", era)).tolist()
    size = sizes[order[place]]
    n_before = era * len(pictures[size]) + sum(sizes[i] == size for i in order[:place])
    own_seed = seeding.derive_seed(seed, "bucket", *size)
    own = sample_indices(own_seed, len(pictures[size]), n_before * count, count)
    return size, [pictures[size][index] for index in own]
