"""The rule by which one way of drawing is chosen, as a pure function of what was judged.

1. What is asked for comes first: who is clearly behind the best at it drops out.
2. Of those left, who is clearly behind the highest identity drops out.
3. Of those left, who clearly drifts more than the least drops out.
4. What is then still left is tied. The run's own way (its final weights, its own scale and guidance)
   wins a tie; else the earliest checkpoint, the lowest scale, the guidance nearest to the run's own.

"Clearly": the interval of the differences, image by image and whole prompts drawn together, is all on
one side of 0. So a handful of pictures changes nothing, and is said to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bunny_lora.evaluation.intervals import is_above_zero


@dataclass(frozen=True)
class Point:
    """One candidate, judged. Rows of all points are of the same prompts and seeds, in the same order.

    Attributes:
        identity: of each image of a character, [N]; 0: the base model, 1: the character itself.
        asked: the share of what its prompt asks for, [N]; None where nothing can tell.
        drift: of each image of nobody, [M]; lower is better; None where nothing can tell.
        order: what decides ties, lowest first.
    """

    identity: torch.Tensor
    asked: torch.Tensor | None
    drift: torch.Tensor | None
    order: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """Which point wins, which cannot be told from it, and who dropped out over what."""

    chosen: int
    tied: list[int]
    dropped: dict[str, list[int]]


def choose_point(
    points: Sequence[Point], clusters: Sequence[object], nobody_clusters: Sequence[object]
) -> Verdict:
    """Return which point the rule of this module chooses.

    Args:
        points: at least one.
        clusters: of each image of a character what makes it like others beside its seed: who, and the
            prompt.
        nobody_clusters: the same of each image of nobody.
    """
    left = list(range(len(points)))
    dropped = {}
    for axis, sign, groups in (
        ("asked", 1, clusters),
        ("identity", 1, clusters),
        ("drift", -1, nobody_clusters),
    ):
        values = {place: getattr(points[place], axis) for place in left}
        if any(value is None or not value.isfinite().any() for value in values.values()):
            continue
        best = max(left, key=lambda place: sign * float(values[place].nanmean()))
        behind = [p for p in left if is_above_zero(sign * (values[best] - values[p]), groups)]
        left = [place for place in left if place not in behind]
        dropped[axis] = behind
    chosen = min(left, key=lambda place: points[place].order)
    return Verdict(chosen, [place for place in left if place != chosen], dropped)
