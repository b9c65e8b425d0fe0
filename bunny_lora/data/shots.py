"""Which frames are of one shot, and which shots are held out of training, to judge it by them.

Neighbouring frames of a film are nearly the same picture: one of them held back while the other is
learnt by heart would praise whatever was learnt.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bunny_lora.data.frames import Sample
from bunny_lora.data.images import open_rgb

THUMB = (16, 9)
# Mean differences of thumbnails, of 1: cuts of the films at hand are above 0.2 where the place changes.
NEIGHBOURS, SAME = 0.08, 0.02
SAME_PLACE = 0.12  # of the place that changes most: an arm that moves makes 0.2 and more
NOBODY = ""
MIN_SHOTS = 3  # of whoever gives one: two shots at least are left to learn from


def shots(paths: Sequence[Path]) -> list[int]:
    """Return for each picture the number of its shot, from 0.

    Neighbours in the order given belong together where little has moved, others where they are nearly
    the same picture.
    """
    thumbs = np.stack([_thumb(path) for path in paths])
    shot = list(range(len(paths)))
    for i in range(1, len(paths)):
        distances = np.abs(thumbs[:i] - thumbs[i]).mean(axis=1)
        alike = set(np.flatnonzero(distances < SAME).tolist())
        if distances[i - 1] < NEIGHBOURS:
            alike.add(i - 1)
        merged = {shot[j] for j in alike} | {i}
        shot = [min(merged) if number in merged else number for number in shot]
    order = {number: place for place, number in enumerate(dict.fromkeys(shot))}
    return [order[number] for number in shot]


def near_duplicates(paths: Sequence[Path]) -> list[int]:
    """Return for each picture the first of its group: neighbours in which nothing much has moved."""
    groups: list[int] = []
    thumbs = [_thumb(path).reshape(-1, 3) for path in paths]
    for i, thumb in enumerate(thumbs):
        first = groups[-1] if groups else i
        moved = np.abs(thumbs[first] - thumb).mean(axis=1).max()
        groups.append(first if moved <= SAME_PLACE else i)
    return groups


def _thumb(path: Path) -> np.ndarray:
    small = open_rgb(path).resize(THUMB, Image.Resampling.BOX)
    return np.asarray(small, np.float32).reshape(-1) / 255


def split(samples: Sequence[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """Return the pictures to learn from, and those that are held out, in whole shots.

    A pure function of the pictures' names and looks: every run on the same data holds out the same.

    Args:
        samples: in the order of the film.
        share: of each character's pictures, about; 0 holds out none. Nobody gives more, but for a first
            shot where it is longer, and who is in fewer than three shots gives none.
    """
    if not share:
        return list(samples), []
    held = _held_shots(samples, shot := shots([sample.path for sample in samples]), share)
    kept = [sample for sample, number in zip(samples, shot, strict=True) if number not in held]
    return kept, [sample for sample, number in zip(samples, shot, strict=True) if number in held]


def told(kept: Sequence[Sample], held: Sequence[Sample]) -> str:
    """Say in a line what is held out, and who gives nothing."""
    given = {name for sample in held for name in sample.characters}
    spared = sorted({name for sample in kept for name in sample.characters} - given)
    text = (
        f"held_out: {len(held)} of {len(kept) + len(held)} images, in whole shots, are not learnt from"
    )
    return text + (f"; none of {', '.join(spared)}, who give too few shots" if spared else "")


def _held_shots(samples: Sequence[Sample], shot: Sequence[int], share: float) -> set[int]:
    counts: dict[int, Counter[str]] = {}
    for sample, number in zip(samples, shot, strict=True):
        counts.setdefault(number, Counter()).update(sample.characters or (NOBODY,))
    total = sum(counts.values(), Counter[str]())
    n_shots = Counter(name for names in counts.values() for name in names)
    held: set[int] = set()
    given: Counter[str] = Counter()

    def may_give(number: int) -> bool:
        return all(
            n_shots[name] >= MIN_SHOTS
            and (not given[name] or given[name] + n <= math.ceil(share * total[name]))
            for name, n in counts[number].items()
        )

    for name in sorted(total, key=lambda name: (total[name], name)):  # the rarest chooses first
        by_size = sorted(
            counts, key=lambda number: (sum(counts[number].values()), _lot(samples, shot, number))
        )
        for number in by_size:
            enough = given[name] >= share * total[name]
            if not enough and name in counts[number] and number not in held and may_give(number):
                held.add(number)
                given.update(counts[number])
    return held


def _lot(samples: Sequence[Sample], shot: Sequence[int], number: int) -> str:
    first = samples[shot.index(number)].path.name
    return hashlib.sha256(first.encode()).hexdigest()
