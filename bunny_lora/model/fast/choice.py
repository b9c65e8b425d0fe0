"""What training computes on a fast path: attention by trial on this machine, and LoRA."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from bunny_lora.core import files
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model.fast import attention as fast_attention
from bunny_lora.model.fast import lora, native, pooled
from bunny_lora.model.fast.attention import N_WORDS, Shape, attention

PLAIN = "plain"
NATIVE = "native attention "
LORA = "LoRA without casts"
AND = "; "
WORTH_IT = 1.1
"""How many times as fast it has to be; less is within what a trial on a busy machine is off by."""
N_TRIALS = 5
# Tokens and heads of a trial: enough for both sides to show what they are, in well under a second.
MAX_TOKENS, MAX_HEADS = 1024, 8


class FastPath(NamedTuple):
    """What is computed another way than diffusers and PEFT do."""

    shapes: list[Shape]
    lora: bool


def shapes_of(base_model: Path, resolution: int, factor: int = 1) -> list[Shape]:
    """Return the attention of a UNet at so many pixels a side: to itself and to words, by level.

    `factor` is training.pooled_attention, which leaves the largest with fewer keys.
    """
    unet = files.read_json(base_model / "unet" / "config.json")
    levels = unet["block_out_channels"]
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim", 8)
    heads = heads if isinstance(heads, Sequence) else [heads] * len(levels)
    side, found = resolution // 8, []
    for kind, channels, count in zip(unet["down_block_types"], levels, heads, strict=True):
        if "CrossAttn" in kind:
            own = pooled.n_averaged((side, side), factor)
            found += [Shape(side**2, keys, channels // count) for keys in (own, N_WORDS)]
        side, factor = -(-side // 2), 1
    return list(dict.fromkeys(found))


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why there is no native attention here; None where there is."""
    if device.type != "cpu" or dtype not in native.DTYPES:
        return f"it is for a CPU in float32 or bfloat16, not for {device.type} in {dtype}"
    try:
        native.library()
    except BunnyLoraError as error:
        return str(error)
    return None


@functools.cache
def speed_up(shape: Shape, dtype: torch.dtype) -> float:
    """Return how many times as fast as torch's own the native attention is, there and back.

    Both take turns, since a machine may be busy with other things; medians are compared.
    """
    counts = (min(n, MAX_TOKENS) for n in (shape.queries, shape.keys, shape.keys))
    inputs = [
        # No random numbers: those of training stay as they were.
        torch.linspace(-2, 2, MAX_HEADS * n * shape.features).sin().to(dtype)
        .view(1, n, MAX_HEADS, shape.features).transpose(1, 2).requires_grad_()
        for n in counts
    ]  # fmt: skip
    times: dict[Any, list[float]] = {scaled_dot_product_attention: [], attention: []}
    for _ in range(N_TRIALS):
        for function, seconds in times.items():
            seconds.append(_seconds(function, inputs))
    theirs, ours = (statistics.median(seconds[1:]) for seconds in times.values())
    return theirs / ours


def _seconds(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> float:
    started = time.perf_counter()
    out = function(*inputs)
    torch.autograd.grad(out, inputs, out.detach())
    return time.perf_counter() - started


def choose(
    setting: str,
    base_model: Path,
    resolution: int,
    device: torch.device,
    dtype: torch.dtype,
    factor: int = 1,
) -> str:
    """Return what of a UNet is computed on a fast path, as a run records it; `read` understands it.

    Args:
        setting: training.fast_path; `auto` takes the attention that is faster by trial, and LoRA
            without casts where there would be casts, on a CPU in bfloat16; `on` all, `off` nothing.
        base_model: the folder of the base model.
        resolution: pixels a side.
        device: where the UNet is.
        dtype: its precision.
        factor: training.pooled_attention.

    Raises:
        BunnyLoraError: `on`, and there is no native attention here.
    """
    if setting == "off":
        return PLAIN
    if reason := why_not(device, dtype):
        if setting == "on":
            raise BunnyLoraError(
                f"training.fast_path: on, but the native attention is not to be had: {reason}. Choose"
                " auto or off."
            )
        shapes = []
    else:
        shapes = shapes_of(base_model, resolution, factor)
    if setting == "auto":
        shapes = [shape for shape in shapes if speed_up(shape, dtype) >= WORTH_IT]
    casts = device.type == "cpu" and dtype == torch.bfloat16
    return write(FastPath(shapes, casts or setting == "on"))


def write(path: FastPath) -> str:
    """Return a fast path as a run records it."""
    native_part = [NATIVE + ", ".join(map(str, path.shapes))] if path.shapes else []
    return AND.join([*native_part, *([LORA] if path.lora else [])]) or PLAIN


def read(chosen: str) -> FastPath:
    """Return what `write` has named."""
    parts = chosen.split(AND)
    texts = parts[0].removeprefix(NATIVE).split(", ") if chosen.startswith(NATIVE) else []
    return FastPath([Shape(*map(int, text.split("x"))) for text in texts], LORA in parts)


def install(unet: torch.nn.Module, path: FastPath, factor: int = 1) -> None:
    """Have a UNet compute on a fast path, until `remove`; nobody else than training should see it.

    A `factor` above 1, training.pooled_attention, is an approximation, see `pooled`.
    """
    remove(unet)
    fast_attention.install(unet, path.shapes)
    if factor > 1:
        pooled.install(unet, factor)
    if path.lora:
        lora.install(unet)


def remove(unet: torch.nn.Module) -> None:
    """Have a UNet compute as diffusers and PEFT do."""
    pooled.remove(unet)
    fast_attention.remove(unet)
    lora.remove(unet)


def explain(
    base_model: Path, resolution: int, device: torch.device, dtype: torch.dtype, factor: int = 1
) -> str:
    """Return why `auto` chose as it did: a reason, or how fast each shape is against torch's own."""
    if reason := why_not(device, dtype):
        return reason
    trials = ((shape, speed_up(shape, dtype)) for shape in shapes_of(base_model, resolution, factor))
    said = ", ".join(f"{shape} {ratio:.2f}" for shape, ratio in trials)
    return f"times as fast as torch's own: {said}"
