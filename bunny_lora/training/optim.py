"""The optimiser and its learning rate's schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bunny_lora.config import Config
from bunny_lora.core.sections import TrainingSection
from bunny_lora.errors import BunnyLoraError

Parameters = Mapping[str, torch.nn.Parameter]

USER_OF = {
    "lr_warmup_steps": "constant_with_warmup, or a schedule that falls",
    "lr_num_cycles": "cosine_with_restarts",
    "lr_power": "polynomial",
}


def build(
    config: Config,
    parameters: Parameters,
    text_encoder_parameters: Parameters | None = None,
) -> tuple[Optimizer, LRScheduler]:
    """Return AdamW, or bitsandbytes' 8-bit version of it, and diffusers' schedule of `lr_scheduler`.

    The text encoder's parameters, by name as the UNet's, follow the same schedule, from a rate of their
    own if there is one. LoRA's B learns `lora_plus_ratio` times as fast as A, see
    https://arxiv.org/abs/2402.12354; PEFT's optimiser of that kind takes one model, and here are two.

    Raises:
        BunnyLoraError: `use_8bit_adam` without bitsandbytes, or where it cannot step.
    """
    training = config.training
    rate, ratio = training.learning_rate, training.lora_plus_ratio
    by_rate: dict[float, list[torch.nn.Parameter]] = {rate: []}
    for found, own_rate in (
        (parameters, rate),
        (text_encoder_parameters or {}, training.text_encoder_learning_rate or rate),
    ):
        for name, parameter in found.items():
            faster = ratio if "lora_B" in name else 1.0
            by_rate.setdefault(own_rate * faster, []).append(parameter)
    groups = [{"params": found, "lr": lr} for lr, found in by_rate.items() if found]
    optimizer = _optimizer(config, groups, next(iter(parameters.values())).device)
    lr_scheduler = get_scheduler(
        training.lr_scheduler,
        optimizer,
        num_warmup_steps=training.lr_warmup_steps,
        num_training_steps=training.max_train_steps,
        num_cycles=training.lr_num_cycles,
        power=training.lr_power,
    )
    return optimizer, lr_scheduler


def unused_keys(lr_scheduler: str) -> set[str]:
    """Return the keys of `training` that a schedule makes nothing of."""
    users = {
        "lr_warmup_steps": lr_scheduler != "constant",
        "lr_num_cycles": lr_scheduler == "cosine_with_restarts",
        "lr_power": lr_scheduler == "polynomial",
    }
    return {key for key, is_used in users.items() if not is_used}


def doubts(config: Config) -> list[str]:
    """Return a line for each setting of rate and schedule that would do nothing, in silence."""
    training, fields = config.training, TrainingSection.model_fields
    name = training.lr_scheduler
    lines = [
        f"training.{key}: {getattr(training, key)} does nothing with training.lr_scheduler: {name}."
        f" Take it out, or choose {USER_OF[key]}."
        for key in sorted(unused_keys(name))
        if getattr(training, key) != fields[key].default
    ]
    if name == "cosine_with_restarts" and training.lr_num_cycles == 1:
        lines.append(f"training.lr_scheduler: {name} is cosine: set training.lr_num_cycles above 1.")
    if name == "polynomial" and training.lr_power == 1:
        lines.append(f"training.lr_scheduler: {name} is linear: set another training.lr_power than 1.")
    if training.text_encoder_learning_rate is not None and not config.lora.train_text_encoder:
        lines.append(
            "training.text_encoder_learning_rate does nothing with lora.train_text_encoder: false. Take"
            " it out, or let the text encoder learn."
        )
    return lines


def describe_schedule(training: TrainingSection) -> str:
    """Return a learning rate and how it changes, in a line: "0.0001, cosine after 10 steps of rise"."""
    own = training.text_encoder_learning_rate
    rate = f"{training.learning_rate:g}" + (f" (text encoder {own:g})" if own is not None else "")
    said = [f"{rate}, {training.lr_scheduler}"]
    used = {"lr_warmup_steps", "lr_num_cycles", "lr_power"} - unused_keys(training.lr_scheduler)
    if "lr_warmup_steps" in used and training.lr_warmup_steps:
        said.append(f"rising in the first {training.lr_warmup_steps} steps")
    if "lr_num_cycles" in used:
        said.append(f"{training.lr_num_cycles} times")
    if "lr_power" in used:
        said.append(f"power {training.lr_power:g}")
    return ", ".join(said)


def _optimizer(config: Config, groups: list[Any], device: torch.device) -> Optimizer:
    settings: Any = {
        "lr": config.training.learning_rate,
        "weight_decay": config.training.weight_decay,
    }
    if not config.use_8bit_adam:
        return torch.optim.AdamW(groups, **settings)
    try:
        import bitsandbytes
    except ImportError:
        raise BunnyLoraError(
            "use_8bit_adam needs the bitsandbytes package: `pip install bitsandbytes`, or set it to"
            " false (LoRA's optimiser state is a few MB anyway)."
        ) from None
    _refuse_unless_it_steps(bitsandbytes.optim.AdamW8bit, device)
    return bitsandbytes.optim.AdamW8bit(groups, **settings)


def _refuse_unless_it_steps(kind: Callable[..., Optimizer], device: torch.device) -> None:
    """Which devices bitsandbytes steps on differs from version to version, so it is tried."""
    trial = torch.nn.Parameter(torch.zeros(4096, device=device))  # Smaller ones are kept in 32 bits.
    trial.grad = torch.zeros_like(trial)
    try:
        kind([trial]).step()
    except Exception as error:  # Whatever a missing kernel raises.
        raise BunnyLoraError(
            f"use_8bit_adam: this version of bitsandbytes cannot step on {device.type} ({error}). Set"
            " it to false (LoRA's optimiser state is a few MB anyway), or use a newer one."
        ) from error
