"""What of a run's page its evaluation fills: pictures before and after, the worst, the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bunny_lora.core.eval_result import EvalResult, ImageScores, Interval
from bunny_lora.report.confusion import confusion
from bunny_lora.report.extremes import N_SHOWN, NO_COPIES, merit, ranked, ruler
from bunny_lora.report.grids import rows_of
from bunny_lora.report.measures import measures
from bunny_lora.report.plot import spread
from bunny_lora.report.runs import Run
from bunny_lora.report.scores import conditions, number
from bunny_lora.report.trait_scores import place
from bunny_lora.report.web import Picture, Strip

MAX_ROWS, MAX_MODELS, MAX_CHARACTERS = 10, 7, 40
STALE = "stale: other weights drew it"
NAMES = {"base": "base model", "final": "with LoRA"}
CHARACTER_COLUMNS = ("identity", "fidelity, base", "fidelity", "consistency", "separation")


def judgement(run: Run) -> dict[str, Any]:
    """Return all that the evaluation of a run says; the run has one."""
    assert run.result is not None
    result = run.result
    named = list(result.models["final"].characters)
    more = len(named) - MAX_CHARACTERS
    remarks = [f"Only the first {MAX_CHARACTERS} of {len(named)} characters are listed."] * (more > 0)
    blind = result.identity.blind if result.identity else {}
    remarks += [f"{name} cannot be judged for identity: {reason}" for name, reason in blind.items()]
    counted = result.traits.counted if result.traits else []
    return {
        "conditions": conditions(result),
        "measures": measures(result),
        "character_columns": CHARACTER_COLUMNS,
        "characters": {name: _row(result, name) for name in named[:MAX_CHARACTERS]},
        "remarks": remarks,
        "trait_names": counted,
        "traits": _traits(result),
        "confusion": confusion(result),
        "before_after": _before_after(run, result),
        "checkpoints": _checkpoints(run, result),
        "ruler": ruler(result),
        "extremes": _extremes(run, result),
        **_copies(run, result),
    }


def _row(result: EvalResult, name: str) -> list[Interval | None]:
    base, final = (result.models[model].characters[name] for model in ("base", "final"))
    placed = result.traits.identity if result.traits else None
    if placed is None and result.identity:
        placed = result.identity.models
    identity = (placed or {}).get("final", {}).get(name)
    return [identity, base.fidelity, final.fidelity, final.consistency, final.separation]


def _traits(result: EvalResult) -> dict[str, list[float | None]]:
    if (found := result.traits) is None:
        return {}
    return {
        name: [place(traits[t]) if t in traits else None for t in found.counted]
        for name, traits in list(found.traits.items())[:MAX_CHARACTERS]
    }


def picture_of(run: Run, image: ImageScores, label: str) -> Picture:
    """Return one drawn image, marked where other weights drew it than there are now."""
    path = run.folder / "evaluation" / image.file
    who = NAMES.get(image.model, image.model)
    alt = f"{who}: {image.prompt or 'the empty prompt'}, seed {image.seed}"
    return Picture(path, alt, label, STALE if run.is_stale(image.model, path) else "")


def _before_after(run: Run, result: EvalResult) -> list[Strip]:
    """Return a strip a prompt: training crops, then base model and LoRA from the same seeds."""
    images = _by_key(result)
    strips = []
    for character, prompt in rows_of(result, MAX_ROWS):
        crops = [
            Picture(run.folder / "evaluation" / file, f"Training crop of {character}", "training")
            for file in result.training_crops.get(character, [])[:1]
        ]
        keys = [key for key in images["final"] if key[:2] == (character, prompt)][:2]
        pairs = [
            picture_of(run, images[model][key], NAMES[model])
            for key in keys
            for model in ("base", "final")
            if key in images.get(model, {})
        ]
        about = "" if crops else "names nobody: should not change"
        strips.append(Strip(prompt or "the empty prompt", [*crops, *pairs], about))
    return strips


def _by_key(result: EvalResult) -> dict[str, dict[tuple, ImageScores]]:
    found: dict[str, dict[tuple, ImageScores]] = {}
    for image in result.images:
        found.setdefault(image.model, {})[image.character, image.prompt, image.seed] = image
    return found


def _checkpoints(run: Run, result: EvalResult) -> list[Strip]:
    """Return how the same prompts and seeds changed from checkpoint to checkpoint, if there are any."""
    images = _by_key(result)
    steps = [model for model in images if model not in NAMES]
    if not steps:
        return []
    models = spread(["base", *steps, "final"], MAX_MODELS)
    strips = []
    for key in min(map(list, images.values()), key=len)[:3]:
        shown = [images[model][key] for model in models if key in images[model]]
        labels = [NAMES.get(i.model, i.model.replace("checkpoint-", "step ")) for i in shown]
        pictures = [picture_of(run, i, label) for i, label in zip(shown, labels, strict=True)]
        strips.append(Strip(key[1], pictures))
    return strips


def _extremes(run: Run, result: EvalResult) -> list[Strip]:
    images = ranked(result)
    n = min(N_SHOWN, len(images))
    parts = {"Worst": images[:n], "Best": images[len(images) - n :][::-1]}
    return [
        Strip(title, [picture_of(run, image, _merit(result, image)) for image in part])
        for title, part in parts.items()
    ]


def _merit(result: EvalResult, image: ImageScores) -> str:
    return f"{number(merit(result, image)[0])} {image.prompt}"


def _copies(run: Run, result: EvalResult) -> dict[str, Any]:
    if (found := result.copies) is None or not found.nearest:
        return {"copies": [], "no_copies": NO_COPIES, "copies_about": ""}
    above = found.above["final"].mean
    about = (
        f"{above:.0%} of the pictures are nearer to what training saw than held-out frames are (5 % by"
        " chance). Each picture stands before what it is most like."
    )
    return {"copies": [Strip("The nearest", list(_pairs(run, result)))], "copies_about": about}


def _pairs(run: Run, result: EvalResult) -> Iterator[Picture]:
    assert result.copies is not None
    folder = run.folder / "evaluation"
    for pair in result.copies.nearest[:6]:
        cosine = f"cosine {number(pair.similarity)}"
        yield Picture(folder / pair.file, f"Drawn picture, {cosine} to the next one", cosine)
        yield Picture(folder / pair.view, f"View of training frame {pair.frame}", f"saw {pair.frame}")
