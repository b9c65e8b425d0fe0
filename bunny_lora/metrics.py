"""What makes a character consistent, as pure functions on unit vectors.

Every measure returns one score an image, [N]; the measure is their mean, and images of two models
drawn from the same prompt and seed can be compared pair by pair. Vectors are rows of length 1, so that
a dot product is a cosine. Scores of different features are different rulers and must not be mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import normalize

from bunny_lora.seeding import generator

N_RESAMPLES = 2000
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean with the ends of its confidence interval, None where there are too few images for one."""

    mean: float
    low: float | None
    high: float | None
    n: int


def fidelity(generated: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Return how much each generated image looks like the character's training crops.

    fᵢ = 1/M · Σⱼ gᵢ·rⱼ, in -1..1, higher is better: DreamBooth's CLIP-I
    (https://arxiv.org/abs/2208.12242, section 4.1). A perfect copy of all crops would score what the
    crops score among themselves, which is below 1.

    Args:
        generated: unit vectors [N, D] of one character's generated images.
        references: unit vectors [M, D] of the same character's training crops.
    """
    return (generated @ references.T).mean(dim=1)


def consistency(generated: torch.Tensor) -> torch.Tensor:
    """Return how much each image of one character looks like the other images of it.

    cᵢ = 1/(N-1) · Σ_{j≠i} gᵢ·gⱼ, in -1..1; its mean is the mean cosine over all pairs. Higher is more
    alike, which is better only together with fidelity and a low `max_copy`: the same picture N times
    scores 1. One image has no other: an empty tensor.

    Args:
        generated: unit vectors [N, D].
    """
    n = len(generated)
    if n < 2:
        return generated.new_empty(0)
    cosines = generated @ generated.T
    return (cosines.sum(dim=1) - cosines.diagonal()) / (n - 1)


def separation(
    generated: torch.Tensor, own: torch.Tensor, references: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return 1 for each image nearer to its own character than to any other, else 0.

    sᵢ = 1 if gᵢ·μ_own > max over the others of gᵢ·μₖ, with μₖ the mean of character k's crops scaled
    to length 1; a tie is a miss. The mean is the accuracy of a nearest-centroid classifier, in 0..1,
    higher is better, `chance_level` by guessing. With one character it is 1 and says nothing.

    Args:
        generated: unit vectors [N, D].
        own: index [N] of the character that each image should show.
        references: for each of K characters, unit vectors [M_k, D] of its training crops.
    """
    centroids = normalize(torch.stack([crops.mean(dim=0) for crops in references]), dim=1)
    cosines = generated @ centroids.T
    mine = cosines.gather(1, own[:, None])
    others = cosines.scatter(1, own[:, None], -torch.inf)
    return (mine > others.max(dim=1, keepdim=True).values).float().squeeze(1)


def chance_level(n_characters: int) -> float:
    """Return the separation of guessing among `n_characters` evenly: 1 / n."""
    return 1 / n_characters


def drift(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """Return how far tuning moved the picture of a prompt that does not name the character.

    dᵢ = 1 - bᵢ·tᵢ, in 0..2, lower is better, 0: the same picture. DreamBooth's language drift
    (https://arxiv.org/abs/2208.12242, section 3.3), measured against the model's own earlier answer.

    Args:
        base: unit vectors [N, D] of the base model's images.
        tuned: unit vectors [N, D] of the tuned model's, same prompts and seeds in the same order.
    """
    return 1 - (base * tuned).sum(dim=1)


def max_copy(generated: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosine to the most similar single training frame, and which frame that is.

    mᵢ = maxⱼ gᵢ·tⱼ, in -1..1, lower is better at equal fidelity: near 1, or above what different
    frames of the film score among each other, hints that a frame was learnt by heart
    (https://arxiv.org/abs/2212.03860 searches for copies in this way).

    Args:
        generated: unit vectors [N, D].
        frames: unit vectors [M, D] of the training frames.

    Returns:
        Scores [N] and frame indices [N].
    """
    best = (generated @ frames.T).max(dim=1)
    return best.values, best.indices


def bootstrap(
    statistic: Callable[[torch.Tensor], torch.Tensor], n: int, *, seed: int
) -> tuple[float, float] | None:
    """Return a percentile bootstrap confidence interval (Efron, 1979) of a statistic of n images.

    Args:
        statistic: takes indices [R, n] of images drawn with replacement, returns R values; a value
            that is not finite is left out.
        n: how many images there are; below three there is no interval.
        seed: the same seed gives the same interval.
    """
    if n < 3:
        return None
    indices = torch.randint(n, (N_RESAMPLES, n), generator=generator(seed, "bootstrap"))
    values = statistic(indices)
    tail = (1 - CONFIDENCE) / 2
    ends = values[values.isfinite()].double().quantile(torch.tensor([tail, 1 - tail]).double())
    return float(ends[0]), float(ends[1])


def interval(scores: torch.Tensor, *, seed: int = 0) -> Interval | None:
    """Return the mean of scores [N] of independent images with its interval; None of no scores."""
    if not len(scores):
        return None
    ends = bootstrap(lambda indices: scores[indices].mean(dim=1), len(scores), seed=seed)
    low, high = ends or (None, None)
    return Interval(float(scores.mean()), low, high, len(scores))


def consistency_interval(
    generated: torch.Tensor, base: torch.Tensor | None = None, *, seed: int = 0
) -> Interval | None:
    """Return the mean `consistency` with its interval; with `base`, generated minus base.

    Each image is in N-1 pairs, so resampling the scores would make the interval about half as wide
    as it must be: here images are resampled, and an image paired with itself is left out.

    Args:
        generated: unit vectors [N, D].
        base: unit vectors [N, D] for the same prompts and seeds, or None.
    """
    if len(generated) < 2:
        return None
    cosines = generated @ generated.T
    if base is not None:
        cosines = cosines - base @ base.T

    def mean_of_pairs(indices: torch.Tensor) -> torch.Tensor:
        different = indices[:, :, None] != indices[:, None, :]
        pairs = cosines[indices[:, :, None], indices[:, None, :]]
        return (pairs * different).sum(dim=(1, 2)) / different.sum(dim=(1, 2))

    n = len(generated)
    mean = float((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))
    low, high = bootstrap(mean_of_pairs, n, seed=seed) or (None, None)
    return Interval(mean, low, high, n)
