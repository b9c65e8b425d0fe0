"""Device, precision and memory of the machine at hand."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from bunny_lora.errors import BunnyLoraError


def resolve_device(name: str) -> torch.device:
    """Return the device for "cpu", "cuda" or "auto" (CUDA where there is one).

    Raises:
        BunnyLoraError: "cuda" without a usable GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise BunnyLoraError("device: cuda, but torch sees no CUDA GPU here; use device: cpu or auto.")
    return torch.device(name)


def resolve_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """Return the precision of the frozen weights and of the arithmetic.

    "auto" is bfloat16 where the hardware multiplies it natively (AMX or AVX-512 BF16 on a CPU), since
    emulated bfloat16 is slower than float32; float16 on older GPUs; else float32.
    """
    if mixed_precision != "auto":
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
    if device.type == "cuda":
        return (
            torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        )
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def free_bytes(device: torch.device) -> float:
    """Return the memory that can be had without swapping: the computer's, or the GPU's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _container_bytes())


def _container_bytes() -> float:
    """Return what a container's limit leaves; the computer's own numbers know nothing of it."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = float((group / "memory.max").read_text(encoding="utf-8"))
        stat = dict(
            line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines()
        )
        used = float((group / "memory.current").read_text(encoding="utf-8")) - float(
            stat["inactive_file"]
        )
        return limit - used
    except (OSError, ValueError, KeyError):  # No limit ("max"), or no such system.
        return float("inf")


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish what it was given, so that a clock that is read next tells its time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gb(device: torch.device) -> float:
    """Return the most memory used so far in GB (10^9 bytes): of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # Unix only
    except ImportError:
        return psutil.Process().memory_info().peak_wset / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if psutil.MACOS else 1024) / 1e9
