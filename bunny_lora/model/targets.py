"""Which layers of a model get a LoRA: by PEFT's names for them, or by what they are."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention

from bunny_lora.errors import BunnyLoraError

LAYERS = (torch.nn.Linear, torch.nn.Conv2d)
# CLIP names its layers differently from the UNet, so one list cannot serve both.
KEYS = {"unet": "target_modules", "text_encoder": "text_encoder_target_modules"}
ATTENTION, FEED_FORWARD = (Attention, CLIPAttention), (FeedForward, CLIPMLP)
# Names for many layers: those inside of such modules. A UNet's other layers are its convolutions,
# projections and time embeddings; CLIP's encoder has none.
GROUPS: dict[str, tuple[type[torch.nn.Module], ...]] = {
    "attention": ATTENTION,
    "attention+ff": ATTENTION + FEED_FORWARD,
    "all": (torch.nn.Module,),
}
_MAX_SUFFIX = 4  # parts of a layer's name that a list is likely to give: ff.net.0.proj


def resolve_targets(model: torch.nn.Module, part: str, targets: Sequence[str]) -> list[str]:
    """Return names as PEFT takes them, those of groups in full; refuse one that no layer has.

    PEFT asks for one match of them all, and passes over the rest.

    Args:
        model: the UNet or text encoder, before any adapter is in it.
        part: "unet" or "text_encoder".
        targets: ends of the names of layers, or of `GROUPS`.

    Raises:
        BunnyLoraError: a name is none; it says which come nearest.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    chosen = {target: _layers_of(model, layers, target) for target in targets}
    if wrong := [target for target, found in chosen.items() if not found]:
        advice = "; ".join(_advice(target, layers) for target in wrong)
        raise BunnyLoraError(f"lora.{KEYS[part]} fits no layer of the {part}: {advice}.")
    if not GROUPS.keys() & set(targets):
        return list(targets)
    wanted = set().union(*chosen.values())
    return [name for name in layers if name in wanted]


def _layers_of(model: torch.nn.Module, layers: Sequence[str], target: str) -> set[str]:
    if target not in GROUPS:
        return {name for name in layers if _ends(name, target)}
    around = [n for n, module in model.named_modules() if isinstance(module, GROUPS[target])]
    inside = tuple(f"{name}." if name else "" for name in around)
    return {name for name in layers if name.startswith(inside)}


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    ends = [parts[-n:] for n in range(1, min(len(parts), _MAX_SUFFIX) + 1)]
    return [".".join(end) for end in ends if not end[0].isdigit()]


def short_name(name: str) -> str:
    """Return the end of a layer's name that a list of targets gives: to_q, to_out.0."""
    return _suffixes(name)[0]


def _advice(target: str, layers: Sequence[str]) -> str:
    """Say what a wrong name may have meant: layers inside of it, or names that are spelt like it."""
    inside = {
        name.rsplit(f"{target}.", 1)[-1] for name in layers if f".{target}." in f".{name}" and target
    }
    if inside:
        return f"{target!r} is no layer but holds {', '.join(sorted(inside)[:6])}"
    suffixes = sorted({end for name in layers for end in _suffixes(name)}, key=lambda n: (len(n), n))
    names = [*GROUPS, *suffixes]
    if near := difflib.get_close_matches(target, names, n=2, cutoff=0.4):
        return f"{target!r} is none, the nearest: {', '.join(near)}"
    return f"{target!r} is none; there are {', '.join(sorted(set(map(short_name, layers))))}"
