"""The native attention: compiled for the machine at hand when it is first asked for, and kept.

A plain shared library called through ctypes: it needs a C++ compiler, but neither ninja nor Python's
and torch's headers, and builds in seconds. Its threads are those of torch's own OpenMP.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor

from bunny_lora.core import files, paths
from bunny_lora.errors import BunnyLoraError

SOURCE = Path(__file__).with_name("attention.cpp")
FOR_THIS_MACHINE = "-march=native"
FLAGS = (
    "-O3", FOR_THIS_MACHINE, "-std=gnu++17", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC",
)  # fmt: skip
TIMEOUT_SEC = 300
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled kernels.

    Raises:
        BunnyLoraError: there is no compiler here, or it cannot build them.
    """
    # Macros tell the compiler's version and the processor's instructions: a folder that is carried to
    # another machine brings no kernel that this one cannot run.
    macros = _compile(FOR_THIS_MACHINE, "-dM", "-E", "-x", "c++", os.devnull)
    key = hashlib.sha256(macros + " ".join(FLAGS).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    built = paths.project_root() / "outputs" / "kernels" / f"attention-{key}.so"
    if not built.is_file():
        with files.atomic_path(built) as part:
            _compile(*FLAGS, str(SOURCE), "-o", str(part))
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise BunnyLoraError(f"the native attention in {built} does not load: {error}") from None


def _compile(*arguments: str) -> bytes:
    compiler = os.environ.get("CXX") or "c++"
    try:
        done = subprocess.run(
            [compiler, *arguments], capture_output=True, check=True, timeout=TIMEOUT_SEC
        )
    except FileNotFoundError:
        raise BunnyLoraError(f"there is no C++ compiler {compiler}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BunnyLoraError(f"the C++ compiler {compiler} does not work: {error}") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["it says nothing"]
        reason = next((line for line in lines if "error" in line), lines[0])[:200]
        raise BunnyLoraError(f"the C++ compiler {compiler} refuses: {reason}") from None
    return done.stdout


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(query · keyᵀ / √features) · value, and the base-2 logarithms of the sums in it.

    Args:
        query: [batch, heads, tokens, features], float32 or bfloat16 on a CPU, last dimension dense.
        key: likewise, of as many tokens as `value`.
        value: likewise.
    """
    out = _empty_like(query)
    sums = query.new_empty(query.shape[:3], dtype=torch.float32)
    _call(library().attention_forward, [query, key, value, out], sums)
    return out, sums


def backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, given that of `out`."""
    grads = (_empty_like(query), _empty_like(key), _empty_like(value))
    _call(library().attention_backward, [query, key, value, out, grad, *grads], sums)
    return grads


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose heads lie side by side in memory, as the next layer reads them."""
    batch, heads, tokens, features = x.shape
    return x.new_empty(batch, tokens, heads, features).transpose(1, 2)


def _call(function: Callable[..., int], tensors: list[torch.Tensor], sums: torch.Tensor) -> None:
    query, key = tensors[:2]
    if isinstance(query, FakeTensor):  # A rehearsal of memory: there are no numbers to compute with.
        return
    size = (*query.shape[:3], key.shape[2], query.shape[3])
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    failed = function(
        ctypes.c_int(query.dtype == torch.bfloat16),
        (ctypes.c_int64 * 5)(*size),
        ctypes.c_float(query.shape[3] ** -0.5),
        (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors)),
        ctypes.c_void_p(sums.data_ptr()),
        (ctypes.c_int64 * len(strides))(*strides),
        ctypes.c_int(torch.get_num_threads()),
    )
    if failed:
        raise BunnyLoraError(f"There was too little memory for attention over {size} numbers.")
