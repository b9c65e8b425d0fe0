"""The optimiser and its schedule."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from bunny_lora.config import Config
from bunny_lora.errors import BunnyLoraError


def build_optimizer(config: Config, parameters: list[torch.nn.Parameter]) -> Optimizer:
    """Return AdamW with torch's defaults, or bitsandbytes' 8-bit version of it.

    Raises:
        BunnyLoraError: `use_8bit_adam` without a CUDA GPU or without bitsandbytes.
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
    if not torch.cuda.is_available():
        raise BunnyLoraError("use_8bit_adam needs a CUDA GPU; set it to false here.")
    return bitsandbytes.optim.AdamW8bit(parameters, lr=config.training.learning_rate)
