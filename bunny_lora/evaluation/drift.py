"""What training changed where nobody is named, against what another seed changes.

Three kinds of prompts, since each can suffer alone: the evaluation's own without the name, other
subjects, and the empty prompt, which is half of classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bunny_lora.core.eval_parts import DriftScore
from bunny_lora.evaluation import metrics
from bunny_lora.evaluation.intervals import prompt_interval
from bunny_lora.evaluation.protocol import EMPTY, NEUTRAL, OTHERS, ImageSpec

KINDS = {"templates": NEUTRAL, "others": OTHERS, "empty": EMPTY}


def drift_scores(plan: Sequence[ImageSpec], vectors: torch.Tensor) -> dict[str, DriftScore]:
    """Return the drift of each kind of prompts between "base" and "final".

    Args:
        plan: the images, those of both models in the same order.
        vectors: unit vectors [N, D] of them.
    """
    scores = {}
    for kind, nobody in KINDS.items():
        rows = {
            model: [i for i, s in enumerate(plan) if (s.model, s.character) == (model, nobody)]
            for model in ("base", "final")
        }
        if rows["base"]:
            prompts = [plan[row].prompt for row in rows["base"]]
            scores[kind] = drift_score(vectors[rows["base"]], vectors[rows["final"]], prompts)
    return scores


def drift_score(base: torch.Tensor, final: torch.Tensor, prompts: Sequence[str]) -> DriftScore:
    """Return how far images of one kind moved, and that over what another seed moves them.

    Args:
        base: unit vectors [N, D] of the base model's images.
        final: unit vectors [N, D] of the tuned model's, same prompts and seeds in the same order.
        prompts: of each image.
    """
    moved = metrics.drift(base, final)
    between_seeds = seed_distance(base, prompts)
    return DriftScore(
        moved=prompt_interval(moved, prompts),
        between_seeds=between_seeds,
        ratio=prompt_interval(moved / between_seeds, prompts) if between_seeds else None,
    )


def seed_distance(base: torch.Tensor, prompts: Sequence[str]) -> float | None:
    """Return 1 minus the mean cosine of two of the base model's images of one prompt.

    None where no prompt has two images, or all of them are the same.
    """
    same = torch.tensor([[a == b for b in prompts] for a in prompts]).triu(diagonal=1)
    if not same.any():
        return None
    distance = float((1 - base @ base.T)[same].mean())
    return distance if distance > 1e-6 else None
