"""Frozen parts of a model wait on the disk while nobody uses them.

Training on encoded pictures and captions takes neither the VAE nor the text encoder, until a picture is
drawn. What is away keeps its shapes, and comes back by itself before it computes or is saved.
"""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from weakref import WeakKeyDictionary

import torch

from bunny_lora.errors import BunnyLoraError
from bunny_lora.model.fast import allocator

_FILES: WeakKeyDictionary[torch.nn.Module, IO[bytes]] = WeakKeyDictionary()
"""The weights of each model that was ever away, written once: they are frozen."""
_AWAY: WeakKeyDictionary[torch.nn.Module, contextlib.ExitStack] = WeakKeyDictionary()
"""What undoes the hooks that bring a model back."""


def offload(model: torch.nn.Module, folder: Path) -> None:
    """Let go of a model's weights until something is computed with it, or its state is asked for.

    What reads or moves its parameters otherwise has to call `onload` before. Those of a LoRA stay, and
    so does a model for which there is too little disk.

    Args:
        model: frozen, but for a LoRA in it.
        folder: where its weights wait, in a file without a name, which ends with the process.
    """
    if model in _AWAY or (model not in _FILES and not _write(model, folder)):
        return
    for parameter in _frozen(model):
        # Not a number, so that a forgotten `onload` cannot pass for a result.
        parameter.data = parameter.data.new_full((1,), torch.nan).expand(parameter.shape)

    def come_back(*_: Any) -> None:
        onload(model)

    hooks = _AWAY[model] = contextlib.ExitStack()
    for part in [model, *model.children()]:  # An autoencoder is called by its halves.
        hooks.callback(part.register_forward_pre_hook(come_back).remove)
        hooks.callback(part.register_state_dict_pre_hook(come_back).remove)
    allocator.give_back_freed_memory()


def onload(model: torch.nn.Module) -> None:
    """Bring the weights of a model back, to the bit, if they are away.

    Raises:
        BunnyLoraError: they can no longer be read.
    """
    if model not in _AWAY:
        return
    allocator.give_back_freed_memory()
    file = _FILES[model]
    file.seek(0)
    for parameter in _frozen(model):
        weights = torch.empty(parameter.shape, dtype=parameter.dtype)
        if file.readinto(_bytes_of(weights)) != weights.nbytes:  # type: ignore[attr-defined]
            raise BunnyLoraError(
                "Weights that waited on the disk while nobody needed them can no longer be read. Is the"
                " disk still there? The same command goes on from the last checkpoint."
            )
        parameter.data = weights.to(parameter.device)
    _AWAY.pop(model).close()


def is_away(model: torch.nn.Module) -> bool:
    """Whether a model's weights are not in memory."""
    return model in _AWAY


def _write(model: torch.nn.Module, folder: Path) -> bool:
    """Write the weights down, and return whether there was room for them."""
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - kept as long as the model
    try:
        for parameter in _frozen(model):
            file.write(_bytes_of(parameter.detach().cpu().contiguous()))
        file.flush()
    except OSError as error:
        print(f"A {type(model).__name__} stays in memory, where it is not needed: {error}")
        file.close()
        return False
    _FILES[model] = file
    weakref.finalize(model, file.close)
    return True


def _frozen(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    return (parameter for name, parameter in model.named_parameters() if "lora_" not in name)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
