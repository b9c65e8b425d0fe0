"""The whole training state on disk, without pickle: adapters, optimiser moments, schedule, position.

Random numbers need no state: each is a function of (seed, purpose, position).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bunny_lora import adapters, runs
from bunny_lora.errors import BunnyLoraError

STATE, OPTIMIZER = "training_state.json", "optimizer.safetensors"


def save_adapters(folder: Path, models: dict[str, PeftModel]) -> None:
    """Write `folder/{unet,text_encoder}/` in PEFT's format, atomically."""
    with runs.atomic_path(folder) as part:
        for name, model in models.items():
            adapters.save_adapter(model, part / name)


def save_checkpoint(
    folder: Path,
    models: dict[str, PeftModel],
    optimizer: Optimizer,
    lr_scheduler: LRScheduler,
    scaler: torch.amp.GradScaler,
    step: int,
) -> None:
    """Write `folder` atomically: adapters as in `save_adapters`, and what is needed to go on."""
    state = optimizer.state_dict()
    moments = {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    with runs.atomic_path(folder) as part:
        for name, model in models.items():
            adapters.save_adapter(model, part / name)
        save_file(moments, part / OPTIMIZER)
        position = {
            "step": step,
            "param_groups": state["param_groups"],
            "lr_scheduler": lr_scheduler.state_dict(),
            "scaler": scaler.state_dict(),
        }
        runs.write_json(part / STATE, position)


def load_checkpoint(
    folder: Path,
    models: dict[str, PeftModel],
    optimizer: Optimizer,
    lr_scheduler: LRScheduler,
    scaler: torch.amp.GradScaler,
) -> int:
    """Put everything back in place and return the step that the checkpoint was written after.

    Raises:
        BunnyLoraError: a part of it is missing, unreadable, or belongs to another run.
    """
    saved = runs.read_json(folder / STATE)
    try:
        for name, model in models.items():
            adapters.load_weights(model, folder / name)
        moments = load_file(folder / OPTIMIZER)
        optimizer.load_state_dict(
            {"state": _by_parameter(moments), "param_groups": saved["param_groups"]}
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise BunnyLoraError(f"The checkpoint {folder} cannot be resumed from: {error}") from error
    lr_scheduler.load_state_dict(saved["lr_scheduler"])
    scaler.load_state_dict(saved["scaler"])
    return saved["step"]


def _by_parameter(moments: dict[str, torch.Tensor]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in moments.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    return state


def list_checkpoints(run_dir: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by step, oldest first; half-written ones are never seen."""
    found = {}
    for folder in run_dir.glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and (folder / STATE).is_file():
            found[int(match[1])] = folder
    return dict(sorted(found.items()))
