"""The whole training state on disk, without pickle: adapters, optimiser moments, schedule, position.

Random numbers need no state: each is a function of (seed, purpose, position). Nor do accumulated
gradients: a checkpoint lies between two steps, where there are none.
"""

from __future__ import annotations

import filecmp
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bunny_lora.core import choice, eval_result, files
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import adapters

STATE, OPTIMIZER = "training_state.json", "optimizer.safetensors"
SUMS = "SHA256SUMS"  # as `sha256sum --check` reads it
KEEP = "keep"  # the user's mark in a checkpoint's folder
N_NEWEST = 2  # never removed: where the newest turns out damaged, the one before is taken


@dataclass
class TrainingState:
    """Everything that a step changes. `skipped` counts steps without an update, in all and in a row."""

    models: dict[str, PeftModel]
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


# ---------------------------------------------------------------------------- save and load


def save_adapters(folder: Path, models: dict[str, PeftModel]) -> None:
    """Write `folder/{unet,text_encoder}/` in PEFT's format, atomically."""
    with files.atomic_path(folder) as part:
        for name, model in models.items():
            adapters.save_adapter(model, part / name)


def save_checkpoint(
    folder: Path, state: TrainingState, about: dict[str, Any], *, milestone: bool = True
) -> None:
    """Write `folder` atomically: adapters as in `save_adapters`, and what is needed to go on.

    Args:
        folder: `checkpoint-<step>`.
        state: what to write; it is between two steps.
        about: whose state it is; written beside it.
        milestone: false for a checkpoint that is there only to go on from, until a newer one is.
    """
    optimizer = state.optimizer.state_dict()
    values = dict(_flat(optimizer["state"]))
    tensors = {key: v.detach().cpu().contiguous() for key, v in values.items() if torch.is_tensor(v)}
    position = {
        "step": state.step,
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
        "milestone": milestone,
        "param_groups": optimizer["param_groups"],
        "optimizer_values": {key: v for key, v in values.items() if key not in tensors},
        "lr_scheduler": state.lr_scheduler.state_dict(),
        "scaler": state.scaler.state_dict(),
    }
    with files.atomic_path(folder) as part:
        part.mkdir()
        for name, model in state.models.items():
            adapters.save_adapter(model, part / name)
        save_file(tensors, part / OPTIMIZER)
        files.write_json(part / STATE, position | about)
        files.write_text(part / SUMS, _sums(part))


def load_checkpoint(folder: Path, state: TrainingState) -> None:
    """Put everything back in place.

    Raises:
        BunnyLoraError: a part of it is missing, unreadable, or belongs to another run.
    """
    saved = files.read_json(folder / STATE)
    try:
        for name, model in state.models.items():
            adapters.load_weights(model, folder / name)
        tensors = load_file(folder / OPTIMIZER) | saved.get("optimizer_values", {})
        state.optimizer.load_state_dict(
            {"state": _by_parameter(tensors), "param_groups": saved["param_groups"]}
        )
        state.lr_scheduler.load_state_dict(saved["lr_scheduler"])
        state.scaler.load_state_dict(saved["scaler"])
        state.step, state.skipped = saved["step"], saved["skipped"]
        state.skipped_in_a_row = saved["skipped_in_a_row"]
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise BunnyLoraError(f"The checkpoint {folder} cannot be resumed from: {error}") from error


def snapshot(state: TrainingState) -> dict[str, Any]:
    """Return all of the state in one value, to hand to another process of the same run."""
    weights = {part: adapters.trainable_parameters(model) for part, model in state.models.items()}
    return {
        "weights": {
            part: {name: p.detach().cpu() for name, p in found.items()}
            for part, found in weights.items()
        },
        "optimizer": state.optimizer.state_dict(),
        "lr_scheduler": state.lr_scheduler.state_dict(),
        "scaler": state.scaler.state_dict(),
        "position": (state.step, state.skipped, state.skipped_in_a_row),
    }


def restore(state: TrainingState, saved: dict[str, Any]) -> None:
    """Put a `snapshot` in place."""
    for part, model in state.models.items():
        for name, parameter in adapters.trainable_parameters(model).items():
            parameter.data.copy_(saved["weights"][part][name])
    state.optimizer.load_state_dict(saved["optimizer"])
    state.lr_scheduler.load_state_dict(saved["lr_scheduler"])
    state.scaler.load_state_dict(saved["scaler"])
    state.step, state.skipped, state.skipped_in_a_row = saved["position"]


def _flat(values: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what an optimiser keeps by its place, "0.exp_avg" or "0.inner.scale"."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _by_parameter(values: dict[str, Any]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in values.items():
        index, *folders, name = key.split(".")
        inner = state.setdefault(int(index), {})
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = value
    return state


# ---------------------------------------------------------------------------- whole or damaged


def _sums(folder: Path) -> str:
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return "".join(f"{_sha256(folder / name)}  {name}\n" for name in names)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None if each is as it was written."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {line[66:]: line[:64] for line in lines}
        if STATE not in sums:
            return f"{SUMS} is cut off"
        for name, digest in sums.items():
            if _sha256(folder / name) != digest:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return f"it cannot be read: {error}"
    return None


def quarantine(folder: Path, why: str) -> Path:
    """Rename a checkpoint to the first free `<why>-<name>`, where nothing looks for it."""
    aside, number = folder.with_name(f"{why}-{folder.name}"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{why}-{folder.name}-{number}")
    folder.rename(aside)
    return aside


def same_adapters(first: Path, second: Path) -> bool:
    """Whether two folders hold the same adapters to the byte."""
    parts = adapters.PARTS
    names = {
        p.relative_to(f) for f in (first, second) for n in parts for p in (f / n).glob("adapter_*")
    }
    shared = [str(name) for name in names]
    return bool(shared) and len(filecmp.cmpfiles(first, second, shared, shallow=False)[0]) == len(
        shared
    )


# ---------------------------------------------------------------------------- which there are


def list_checkpoints(run_dir: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by step, oldest first; half-written ones are never seen."""
    found = {}
    for folder in run_dir.glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and (folder / STATE).is_file():
            found[int(match[1])] = folder
    return dict(sorted(found.items()))


def recorded_precision(folder: Path) -> str | None:
    """Return the precision that a checkpoint was trained in, "bfloat16" for one; None if unrecorded."""
    return recorded_environment(folder).get("precision")


def recorded_environment(folder: Path) -> dict[str, str]:
    """Return what a checkpoint was made in; empty where it does not say so."""
    try:
        return dict(files.read_json(folder / STATE)["history"][-1]["environment"])
    except (BunnyLoraError, KeyError, IndexError, TypeError, ValueError):
        return {}


def remove_old(run_dir: Path, keep: int | None, *, finished: bool = False) -> None:
    """Remove the checkpoints that nobody needs any more.

    The newest two stay until the run has finished, milestones stay (the last `keep` of them, None is
    all), and so do those that hold a file `keep` or that the evaluation speaks of.
    """
    checkpoints = list_checkpoints(run_dir)
    milestones = [step for step, folder in checkpoints.items() if _is_milestone(folder)]
    kept = set(milestones if keep is None else milestones[-keep:])
    kept |= {step for step, folder in checkpoints.items() if (folder / KEEP).exists()}
    kept |= set(list(checkpoints)[-1:] if finished else list(checkpoints)[-N_NEWEST:])
    evaluated = _evaluated(run_dir, checkpoints.values(), say=finished)
    for step, folder in checkpoints.items():
        if step not in kept and folder.name not in evaluated:
            files.remove(folder)


def _is_milestone(folder: Path) -> bool:
    try:
        return files.read_json(folder / STATE)["milestone"]
    except (BunnyLoraError, KeyError, TypeError):
        return True


def _evaluated(run_dir: Path, checkpoints: Iterable[Path], *, say: bool) -> set[str]:
    """Return the names that the evaluation speaks of; all of them where it cannot be understood."""
    try:
        result, chosen = eval_result.find(run_dir), choice.find(run_dir)
    except BunnyLoraError as error:
        if say:
            print(f"All checkpoints stay, since the evaluation may speak of them. {error}")
        return {folder.name for folder in checkpoints}
    return (set(result.models) if result else set()) | ({chosen.best.model} if chosen else set())
