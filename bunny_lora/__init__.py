"""Teach a small Stable Diffusion new cartoon characters on an ordinary CPU."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bunny_lora.evaluation import evaluate
    from bunny_lora.inference import generate_image, load_lora_pipeline
    from bunny_lora.prepare import prepare_data
    from bunny_lora.trainer import LoRATrainer

__all__ = ["LoRATrainer", "evaluate", "generate_image", "load_lora_pipeline", "prepare_data"]

__version__ = "0.1.0"

# Read once, when torch is imported, so it is set here or not at all; what the user has set stands.
# A thread that waits for another spins by default, and takes the core from the one it waits for as
# soon as anything else runs on this computer: steps became 10 to 50 times slower (see LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Loaded when they are asked for: `import bunny_lora` itself takes no torch and no time.
_HOMES = {
    "LoRATrainer": "trainer",
    "evaluate": "evaluation",
    "generate_image": "inference",
    "load_lora_pipeline": "inference",
    "prepare_data": "prepare",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
