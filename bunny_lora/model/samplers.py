"""What a picture is denoised with: the model's own sampler, or another of diffusers by a short name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import diffusers
from diffusers.schedulers import KarrasDiffusionSchedulers

from bunny_lora.errors import BunnyLoraError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

OWN = "own"
KARRAS = {"use_karras_sigmas": True}
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "pndm": ("PNDMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "dpm++-2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++-2m-karras": ("DPMSolverMultistepScheduler", KARRAS),
}
"""What `sampling.sampler` names beside the model's own: class of diffusers, and its options."""


def recorded(name: str) -> str:
    """Return how images and runs call a sampler: by its class, or by its name if that has options."""
    kind, options = described(name)
    return name if options else kind


def described(name: str) -> tuple[str, dict[str, Any]]:
    """Return class and options of a sampler that is called by its name or by its class."""
    return SAMPLERS.get(name, (name, {}))


def called(kind: str, options: Mapping[str, Any]) -> str:
    """Return what `described` was given.

    Raises:
        BunnyLoraError: no sampler here is of this class with these options.
    """
    found = [name for name, known in SAMPLERS.items() if known == (kind, options)]
    if options and not found:
        raise BunnyLoraError(f"No sampler here is a {kind[:100]} with the options {options}.")
    return recorded(found[0]) if found else kind


@contextlib.contextmanager
def used(pipe: StableDiffusionPipeline, name: str) -> Iterator[None]:
    """Have a pipeline draw with a sampler, and with its own again afterwards.

    Raises:
        BunnyLoraError: diffusers has no such sampler for this kind of model.
    """
    own = pipe.scheduler
    kind, options = described(name)
    if name != type(own).__name__:
        pipe.scheduler = _class(kind).from_config(own.config, **options)
    try:
        yield
    finally:
        pipe.scheduler = own


def _class(name: str) -> Any:
    known = {scheduler.name: scheduler for scheduler in KarrasDiffusionSchedulers}
    if name not in known:
        raise BunnyLoraError(f"No sampler {name[:100]!r}: diffusers has {', '.join(sorted(known))}.")
    return getattr(diffusers, name)
