"""What makes a character consistent, as pure functions on unit vectors.

Every measure returns one score an image, [N]; the measure is their mean, and images of two models
drawn from the same prompt and seed can be compared pair by pair. Vectors are rows of length 1, so that
a dot product is a cosine. Scores of different features are different rulers and must not be mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from bunny_lora.core.eval_result import Interval, Intervals
from bunny_lora.core.seeding import generator

N_RESAMPLES = 2000
CONFIDENCE = 0.95
MAX_PAIRS = 1 << 22


@dataclass(frozen=True)
class Scores:
    """Scores of one model's images.

    Attributes:
        vectors: unit vectors [N, D].
        labels: index [N] of the character that each image should show.
        values: for every measure of single images, [N] scores.
    """

    vectors: torch.Tensor
    labels: torch.Tensor
    values: dict[str, torch.Tensor]

    def of(self, character: int) -> Scores:
        """Return those of one character's images alone."""
        chosen = self.labels == character
        values = {name: scores[chosen] for name, scores in self.values.items()}
        return Scores(self.vectors[chosen], self.labels[chosen], values)


def score(
    generated: torch.Tensor,
    labels: torch.Tensor,
    references: Sequence[torch.Tensor],
    frames: torch.Tensor,
) -> Scores:
    """Score generated images one by one.

    Args:
        generated: unit vectors [N, D].
        labels: index [N] of the character that each image should show.
        references: for each of K characters, unit vectors [M_k, D] of its training crops.
        frames: unit vectors [M, D] of all training frames.
    """
    similarity = [fidelity(row[None], references[k]) for row, k in zip(generated, labels, strict=True)]
    values = {
        "fidelity": torch.cat(similarity),
        "separation": separation(generated, labels, references),
        "memorisation": memorisation(generated, frames)[0],
    }
    return Scores(generated, labels, values)


def summarise(scores: Scores, base: Scores | None = None) -> Intervals:
    """Return every measure's mean with its interval; with `base`, of the differences scores - base.

    Args:
        scores: of one model's images, at least one.
        base: of another's images for the same prompts and seeds, in the same order.
    """
    changes = {
        name: values if base is None else values - base.values[name]
        for name, values in scores.values.items()
    }
    pairs = consistency_interval(scores.vectors, scores.labels, base.vectors if base else None)
    return Intervals(**{name: interval(values) for name, values in changes.items()}, consistency=pairs)


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
    alike, which is better only together with fidelity and a low `memorisation`: the same picture N
    times scores 1. One image has no other: an empty tensor.

    Args:
        generated: unit vectors [N, D].
    """
    n = len(generated)
    if n < 2:
        return generated.new_empty(0)
    cosines = generated @ generated.T
    return (cosines.sum(dim=1) - cosines.diagonal()) / (n - 1)


def separation(
    generated: torch.Tensor, labels: torch.Tensor, references: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return 1 for each image nearer to its own character than to any other, else 0.

    sᵢ = 1 if gᵢ·μ_own > max over the others of gᵢ·μₖ, with μₖ the mean of character k's crops scaled
    to length 1; a tie is a miss. The mean is the accuracy of a nearest-centroid classifier, in 0..1,
    higher is better, `chance_level` by guessing. With one character it is 1 and says nothing.

    Args:
        generated: unit vectors [N, D].
        labels: index [N] of the character that each image should show.
        references: for each of K characters, unit vectors [M_k, D] of its training crops.
    """
    cosines = centroid_cosines(generated, references)
    labelled = cosines.gather(1, labels[:, None])
    others = cosines.scatter(1, labels[:, None], -torch.inf)
    return (labelled > others.max(dim=1, keepdim=True).values).float().squeeze(1)


def centroid_cosines(generated: torch.Tensor, references: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the cosine of each generated image to the centroid of each character's crops, [N, K].

    Args:
        generated: unit vectors [N, D].
        references: for each of K characters, unit vectors [M_k, D] of its training crops.
    """
    centroids = normalize(torch.stack([crops.mean(dim=0) for crops in references]), dim=1)
    return generated @ centroids.T


def chance_level(n_characters: int) -> float:
    """Return the separation of guessing among `n_characters` evenly: 1 / n."""
    return 1 / n_characters


def separation_of_crops(references: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return `separation` of the training crops themselves, each left out of its own centroid.

    What these features can tell apart at best, to read `separation` against. Neighbouring frames of
    one scene look alike and flatter it. A character with a single crop is left out.

    Args:
        references: for each of K characters, unit vectors [M_k, D] of its training crops.

    Returns:
        1 or 0 for every crop, characters in order, [sum of M_k over those with M_k > 1].
    """
    scores = []
    for k, crops in enumerate(references):
        for i in range(len(crops) if len(crops) > 1 else 0):
            rest = torch.cat([crops[:i], crops[i + 1 :]])
            others = [*references[:k], rest, *references[k + 1 :]]
            scores.append(separation(crops[i : i + 1], torch.tensor([k]), others))
    return torch.cat(scores) if scores else torch.empty(0)


def drift(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """Return how far tuning moved the picture of a prompt that does not name the character.

    dᵢ = 1 - bᵢ·tᵢ, in 0..2, lower is better, 0: the same picture. DreamBooth's language drift
    (https://arxiv.org/abs/2208.12242, section 3.3), measured against the model's own earlier answer.

    Args:
        base: unit vectors [N, D] of the base model's images.
        tuned: unit vectors [N, D] of the tuned model's, same prompts and seeds in the same order.
    """
    return 1 - (base * tuned).sum(dim=1)


def memorisation(generated: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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


def nearest_other(frames: torch.Tensor) -> torch.Tensor:
    """Return each training frame's cosine to the most similar other one: `memorisation` of the data.

    Args:
        frames: unit vectors [M, D]; of a single frame the result is empty.
    """
    if len(frames) < 2:
        return frames.new_empty(0)
    return (frames @ frames.T).fill_diagonal_(-torch.inf).max(dim=1).values


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
    chunks = indices.split(max(1, MAX_PAIRS // n**2))  # statistics of pairs need n² numbers a resample
    values = torch.cat([statistic(chunk) for chunk in chunks]).double()
    tail = (1 - CONFIDENCE) / 2
    ends = values[values.isfinite()].quantile(torch.tensor([tail, 1 - tail]).double())
    return float(ends[0]), float(ends[1])


def interval(scores: torch.Tensor, *, seed: int = 0) -> Interval:
    """Return the mean of scores [N] of independent images with its interval; N is at least 1."""
    ends = bootstrap(lambda indices: scores[indices].mean(dim=1), len(scores), seed=seed)
    low, high = ends or (None, None)
    return Interval(mean=float(scores.mean()), low=low, high=high, n=len(scores))


def consistency_interval(
    generated: torch.Tensor,
    labels: torch.Tensor,
    base: torch.Tensor | None = None,
    *,
    seed: int = 0,
) -> Interval | None:
    """Return the mean cosine over pairs of one character, with its interval; None without a pair.

    Each image is in many pairs, so resampling per-image scores would make the interval about half as
    wide as it must be: here images are resampled, and an image paired with itself is left out.

    Args:
        generated: unit vectors [N, D].
        labels: index [N] of the character that each image should show; only images of the same
            character are compared.
        base: unit vectors [N, D] for the same prompts and seeds; the measure is then generated minus
            base.
    """
    same = labels[:, None] == labels[None, :]
    n_images, n_pairs = len(labels), int(same.sum()) - len(labels)
    if n_pairs == 0:
        return None
    cosines = (generated @ generated.T - (0 if base is None else base @ base.T)) * same

    def mean_of_pairs(indices: torch.Tensor) -> torch.Tensor:
        rows, columns = indices[:, :, None], indices[:, None, :]
        counted = (rows != columns) & same[rows, columns]
        return (cosines[rows, columns] * counted).sum(dim=(1, 2)) / counted.sum(dim=(1, 2))

    mean = float((cosines.sum() - cosines.diagonal().sum()) / n_pairs)
    low, high = bootstrap(mean_of_pairs, n_images, seed=seed) or (None, None)
    return Interval(mean=mean, low=low, high=high, n=n_images)
