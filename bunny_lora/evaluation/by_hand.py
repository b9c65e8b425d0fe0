"""A choice that a person made: handed on like one of the rule, and recorded as what it is."""

from __future__ import annotations

from pathlib import Path

from bunny_lora.config import load_config
from bunny_lora.core import choice as choice_file
from bunny_lora.core.choice import Candidate, Choice
from bunny_lora.core.paths import resolve
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import adapters
from bunny_lora.training import handover

WHY = "chosen by hand"


def hand_on(
    run_dir: str | Path, model: str, lora_scale: float, guidance_scale: float | None = None
) -> Choice:
    """Have a run drawn with these weights from now on: `choice.json` and `handover.json` say so.

    Where `choose` has judged candidates, their scores stay, and one of them is marked.

    Args:
        run_dir: a run that was trained to its end.
        model: `final` or `checkpoint-<step>`.
        lora_scale: strength of the LoRA, 1: as trained.
        guidance_scale: None is the one of the run's configuration.

    Raises:
        BunnyLoraError: no such weights, or the run has not been trained to its end.
    """
    run_dir = resolve(run_dir)
    weights, final = (adapters.adapter_digest(run_dir / name) for name in (model, "final"))
    if weights is None or final is None:
        lacking = model if weights is None else "final"
        raise BunnyLoraError(f"There are no weights in {run_dir / lacking}, so nothing is handed on.")
    config = load_config(run_dir / "config.yaml")
    wanted = Candidate(
        model=model,
        step=config.training.max_train_steps if model == "final" else int(model.rpartition("-")[2]),
        lora_scale=lora_scale,
        guidance_scale=config.sampling.guidance_scale if guidance_scale is None else guidance_scale,
        identity=None,
        asked=None,
        drift=None,
        files=[],
    )
    known = choice_file.find(run_dir)
    if known is None or known.final_sha256 != final:  # else judged among other weights than there are
        known = Choice(
            judged_by="nobody",
            held_out=False,
            n_frames=0,
            losses=[],
            candidates=[],
            chosen=0,
            tied=[],
            why="",
            weights_sha256="",
            final_sha256=final,
        )
    candidates = list(known.candidates)
    labels = [candidate.label for candidate in candidates]
    if wanted.label not in labels:
        candidates.append(wanted)
        labels.append(wanted.label)
    changes = {
        "candidates": candidates,
        "chosen": labels.index(wanted.label),
        "tied": [],
        "why": WHY,
        "weights_sha256": weights,
        "by_hand": True,
    }
    choice = known.model_copy(update=changes)
    choice_file.write(run_dir, choice)
    handover.write_handover(run_dir, config)
    return choice
