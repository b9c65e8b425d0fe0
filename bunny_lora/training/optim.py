"""The optimiser and its schedule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim import Optimizer

from bunny_lora.config import Config
from bunny_lora.errors import BunnyLoraError


def build_optimizer(config: Config, parameters: list[torch.nn.Parameter]) -> Optimizer:
    """Return AdamW with torch's defaults, or bitsandbytes' 8-bit version of it.

    Raises:
        BunnyLoraError: `use_8bit_adam` without bitsandbytes, or where it cannot step.
    """
    if not config.use_8bit_adam:
        return torch.optim.AdamW(parameters, lr=config.training.learning_rate)
    try:
        import bitsandbytes
    except ImportError:
        raise BunnyLoraError(
            "use_8bit_adam needs the bitsandbytes package: `pip install bitsandbytes`, or set it to"
            " false (LoRA's optimiser state is a few MB anyway)."
        ) from None
    _refuse_unless_it_steps(bitsandbytes.optim.AdamW8bit, parameters[0].device)
    return bitsandbytes.optim.AdamW8bit(parameters, lr=config.training.learning_rate)


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
