"""Two characters in one image: is each of them there?

Where two are asked for, small models draw one twice, or one animal with something of both. So each of
two windows that do not overlap is compared with the references of one of them; whichever way round and
whichever windows are most like both are taken. Somebody is there from half-way between floor and
ceiling on, see `anchors`. Features that cannot tell two characters apart are blind to this as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bunny_lora.config import Config
from bunny_lora.core.eval_parts import THERE, Interval, PairImage, Pairs
from bunny_lora.core.eval_result import IdentityScores
from bunny_lora.evaluation.cutouts import apart, look
from bunny_lora.evaluation.intervals import prompt_interval
from bunny_lora.evaluation.protocol import ImageSpec, image_seed
from bunny_lora.model.image_encoder import FeatureExtractor

MAX_PAIRS = 6


@dataclass(frozen=True)
class PairSpec:
    """An image of two characters, and who they are."""

    image: ImageSpec
    names: tuple[str, str]


def plan_pairs(config: Config, characters: Sequence[str]) -> list[PairSpec]:
    """Return the images of the first `MAX_PAIRS` pairs of characters, by base model and LoRA."""
    evaluation = config.evaluation
    return [
        PairSpec(
            ImageSpec(
                model,
                f"{first} and {second}",
                index,
                prompt.replace("{first}", first).replace("{second}", second),
                image_seed(evaluation.seed, index, number),
            ),
            (first, second),
        )
        for model in ("base", "final")
        for first, second in list(itertools.combinations(characters, 2))[:MAX_PAIRS]
        for index, prompt in enumerate(evaluation.pair_prompts)
        for number in range(evaluation.num_images_per_prompt)
    ]


def pair_scores(
    run_dir: Path,
    plan: Sequence[PairSpec],
    references: Mapping[str, torch.Tensor],
    extractor: FeatureExtractor,
    identity: IdentityScores | None,
) -> Pairs | None:
    """Return who is there in each image; None where nothing is asked for, or nobody can be judged.

    Args:
        run_dir: the run's folder.
        plan: from `plan_pairs`.
        references: unit vectors of each character, [M, D].
        extractor: what made them.
        identity: has the floors and ceilings; of whom it is blind, no pair is judged.
    """
    judged = set(identity.anchors) - set(identity.blind) if identity else set()
    plan = [spec for spec in plan if judged.issuperset(spec.names)]
    if identity is None or not plan:
        return None
    seen = look([run_dir / "evaluation" / spec.image.file for spec in plan], extractor)
    images = []
    for spec, windows in zip(plan, seen, strict=True):
        ends = [_ends(identity, name) for name in spec.names]
        likeness = [windows @ references[name].mean(0) for name in spec.names]
        found = [
            (values - floor) / (ceiling - floor)
            for values, (floor, ceiling) in zip(likeness, ends, strict=True)
        ]
        first, second = most_like_both(*found)
        images.append(
            PairImage(
                model=spec.image.model,
                names=list(spec.names),
                prompt=spec.image.prompt,
                file=spec.image.file,
                identity=[first, second],
            )
        )
    return Pairs(both=_shares(images, 2), one=_shares(images, 1), images=images)


def _ends(identity: IdentityScores, name: str) -> tuple[float, float]:
    anchors = identity.anchors[name]
    assert anchors.ceiling is not None  # of whom there is none, identity is blind
    floor = max(anchors.base.mean, anchors.wrong.mean if anchors.wrong else -1.0)
    return floor, anchors.ceiling.mean


def most_like_both(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """Return the identities of two characters in the two windows apart that hold most of both.

    Of such windows those count in which more of the two are there, and then in which the lesser of
    their identities is highest: one character drawn twice is not both.

    Args:
        first: identity of one of them in each window, [windows].
        second: that of the other.
    """
    found = [(float(first[i]), float(second[j])) for i, j in apart()]
    return max(found, key=lambda two: (sum(value >= THERE for value in two), min(two)))


def _shares(images: Sequence[PairImage], n_there: int) -> dict[str, Interval]:
    found = {}
    for model in dict.fromkeys(image.model for image in images):
        own = [image for image in images if image.model == model]
        values = torch.tensor([float(image.n_there == n_there) for image in own])
        found[model] = prompt_interval(values, [image.prompt for image in own])
    return found
