"""Which layers of a model get a LoRA: PEFT's names for them, each of which has to mean one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch

from bunny_lora.errors import BunnyLoraError

LAYERS = (torch.nn.Linear, torch.nn.Conv2d)
# CLIP names its layers differently from the UNet, so one list cannot serve both.
KEYS = {"unet": "target_modules", "text_encoder": "text_encoder_target_modules"}
_MAX_SUFFIX = 4  # parts of a layer's name that a list is likely to give: ff.net.0.proj


def check_targets(model: torch.nn.Module, part: str, targets: Sequence[str]) -> None:
    """Refuse a name that no layer has: PEFT asks for one match of them all, and passes over the rest.

    Args:
        model: the UNet or text encoder, before any adapter is in it.
        part: "unet" or "text_encoder".
        targets: ends of the names of layers, as PEFT takes them.

    Raises:
        BunnyLoraError: a name is none; it says which come nearest.
    """
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, LAYERS)]
    wrong = [target for target in targets if not any(_ends(name, target) for name in layers)]
    if not wrong:
        return
    names = sorted({end for name in layers for end in _suffixes(name)}, key=lambda n: (len(n), n))
    advice = "; ".join(_advice(target, layers, names) for target in wrong)
    raise BunnyLoraError(f"lora.{KEYS[part]} fits no layer of the {part}: {advice}.")


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    ends = [parts[-n:] for n in range(1, min(len(parts), _MAX_SUFFIX) + 1)]
    return [".".join(end) for end in ends if not end[0].isdigit()]


def _advice(target: str, layers: Sequence[str], names: Sequence[str]) -> str:
    """Say what a wrong name may have meant: layers inside of it, or names that are spelt like it."""
    inside = {
        name.rsplit(f"{target}.", 1)[-1] for name in layers if f".{target}." in f".{name}" and target
    }
    if inside:
        return f"{target!r} is no layer but holds {', '.join(sorted(inside)[:6])}"
    if near := difflib.get_close_matches(target, names, n=2, cutoff=0.4):
        return f"{target!r} is none, the nearest: {', '.join(near)}"
    short = sorted({_suffixes(name)[0] for name in layers})
    return f"{target!r} is none; there are {', '.join(short)}"
