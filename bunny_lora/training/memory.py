"""Whether a training step and a picture fit into the memory that is free, found out before.

The system ends a process that takes too much without a word. So a step is rehearsed with tensors that
have shapes and no contents, which takes seconds and no memory, and its peak is counted.
"""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import devices
from bunny_lora.model.components import Components

if TYPE_CHECKING:
    from bunny_lora.training.setup import Setup

# Fitted on random-bk-sdm-tiny, 2 threads. A step in float32 took 0.48 GB at 256 px, 1.71 GB at 512 px
# and 1.26 GB there with gradient checkpointing; tensors alone are 0.26, 1.01 and 0.36 GB. In bfloat16
# at 512 px: 0.70 GB on the fast path, 0.44 GB with gradient checkpointing, 1.35 GB with two images,
# 1.27 GB with LoRA on all layers, 1.05 GB on the plain path; the formula gives 0.79, 0.40, 1.40, 1.22
# and 0.96.
GAPS = 1.2  # what the allocator takes for each byte of tensors
REPACKED = {torch.float32: 0.5, torch.bfloat16: 0.28}  # of the weights, in the layout of CPU kernels
SPARE = 0.25e9  # for whatever else the user does
PLENTY = 10  # times the weights, and a GB: so much is free that a rehearsal, of 3 s, is not needed


class _Counter(TorchDispatchMode):
    """Counts the bytes of all tensors without contents that are alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, FakeTensor):  # Parameters are in memory already, whoever views them.
                self.known.add(leaf.untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor):
                self._count(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def step_bytes(setup: Setup) -> float:
    """Return the most that one micro-batch and one update need on top of the model in memory.

    Activations, gradients and the optimiser's moments; also with gradient checkpointing.
    """
    parts, training, config = setup.parts, setup.config.training, setup.config
    count = training.batch_size * (2 if config.prior_preservation.enabled else 1)
    side, device = config.resolution // 8, parts.device
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    unet, is_trained = _to_fake(parts.unet, mode), config.lora.train_text_encoder
    text_encoder = _to_fake(parts.text_encoder, mode) if is_trained else None
    with mode, torch.enable_grad():
        latents = torch.empty(count, parts.unet.config.in_channels, side, side, device=device)
        tokens = torch.zeros(count, parts.tokenizer.model_max_length, dtype=torch.long, device=device)
        timesteps = torch.zeros(count, dtype=torch.long, device=device)
        width = parts.unet.config.cross_attention_dim
        words = torch.empty(*tokens.shape, width, dtype=parts.dtype, device=device)
        with _Counter() as counter:
            hidden = text_encoder(tokens)[0] if text_encoder else words
            prediction = unet(latents.to(parts.dtype), timesteps, hidden).sample
            torch.nn.functional.mse_loss(prediction.float(), latents).backward()
    moments = sum(2 * p.numel() * p.element_size() for p in setup.trainable())
    return GAPS * counter.peak + moments + _repacked(parts, parts.unet)


def image_bytes(parts: Components, resolution: int) -> float:
    """Return the most that the VAE needs to decode one picture; encoding one needs less.

    For 512 px in float32 that is 1.13 GB with the constants above, and 1.23 GB were measured; in
    bfloat16 0.53 and 0.76 GB; for 256 px in float32 0.41 and 0.44 GB: `SPARE` covers the difference.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    vae: Any = _to_fake(parts.vae, mode)
    side = resolution // 8
    shape = (1, parts.vae.config.latent_channels, side, side)
    with mode, torch.no_grad():
        latents = torch.empty(shape, dtype=parts.dtype, device=parts.device)
        with _Counter() as counter:
            vae.decode(latents)
    return GAPS * counter.peak + _repacked(parts, parts.vae)


def _repacked(parts: Components, model: torch.nn.Module) -> float:
    return REPACKED[parts.dtype] * _weights(model) if parts.device.type == "cpu" else 0


def _weights(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _to_fake(model: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    """Return a copy of a model whose tensors have shapes and no contents."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})


def check_images(parts: Components, resolution: int) -> None:
    """Refuse to encode and draw pictures that would not fit.

    Raises:
        BunnyLoraError: the VAE needs more than is free; says how much, and what to lower.
    """
    if _plenty(parts, 1, resolution):
        return
    _refuse_above(image_bytes(parts, resolution), parts, "A picture", [_lower_resolution(resolution)])


def check(setup: Setup) -> None:
    """Refuse to start what would not fit.

    Raises:
        BunnyLoraError: a step needs more than is free; says how much, and what to lower.
    """
    config, training = setup.config, setup.config.training
    trained = 16 * sum(p.numel() for p in setup.trainable())  # weights, gradients and moments
    if _plenty(setup.parts, training.batch_size, config.resolution, trained):
        return
    ways = {
        "training.gradient_checkpointing: true": not training.gradient_checkpointing,
        "training.low_memory: true": not training.low_memory,
        f"training.batch_size below {training.batch_size} (more gradient_accumulation_steps make up"
        " for it)": training.batch_size > 1,
        _lower_resolution(config.resolution): True,
        f"lora.rank below {config.lora.rank}": config.lora.rank > 8,
        "lora.train_text_encoder: false": config.lora.train_text_encoder,
    }
    helping = [way for way, helps in ways.items() if helps]
    _refuse_above(step_bytes(setup), setup.parts, "A training step", helping)


def _plenty(parts: Components, batch_size: int, resolution: int, trained_bytes: int = 0) -> bool:
    n_times = max(1, batch_size * (resolution / 512) ** 2)
    enough = n_times * (PLENTY * _weights(parts.unet) + 1e9) + trained_bytes
    return devices.free_bytes(parts.device) > enough


def _lower_resolution(resolution: int) -> str:
    return f"resolution below {resolution}"


def _refuse_above(needed: float, parts: Components, what: str, ways: list[str]) -> None:
    needed, free = needed + SPARE, devices.free_bytes(parts.device)
    if needed <= free:
        return
    lines = "\n".join(f"  - {way}" for way in ways)
    raise BunnyLoraError(
        f"{what} needs about {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB of memory are free on"
        f" {parts.device}. Nothing was begun. Close other programs, or set one of these, the first of"
        f" them helping most:\n{lines}"
    )
