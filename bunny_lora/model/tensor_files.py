"""Tensors from a file that came from anywhere: none of it is run, and what is no such file is named."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bunny_lora.errors import BunnyLoraError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE_NUMBERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_MAX_HEADER = 100_000_000  # bytes, safetensors' own limit
PICKLE = (
    "is a pickle (torch's .pt, .bin, .ckpt), which can run code; take a"
    " .safetensors file of it, or convert it where you trust it"
)
UNKNOWN = "is no safetensors file, or a damaged one"
_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGE = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml")


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file as they are, by the names in it, and its metadata.

    Raises:
        BunnyLoraError: it is no safetensors file, or cut off.
    """
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        raise BunnyLoraError(f"{path} {trouble(path)}.") from None
    return state, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Return what a safetensors file says of itself.

    Raises:
        BunnyLoraError: it is no safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        raise BunnyLoraError(f"{path} {trouble(path)}.") from None


def checked(name: str, tensor: torch.Tensor, path: Path) -> torch.Tensor:
    """Return a tensor from a file as float32; refuse one of other kinds or with NaN.

    A strength (`….alpha`) may be a whole number; several tools write one.
    """
    whole = name.endswith(".alpha") and tensor.dtype in _WHOLE_NUMBERS
    if not (tensor.dtype in DTYPES or whole) or tensor.layout != torch.strided:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise BunnyLoraError(f"The weights in {path} hold {kind} where numbers should be: {name}.")
    tensor = tensor.detach().float()
    if not torch.isfinite(tensor).all():
        raise BunnyLoraError(f"The weights in {path} hold NaN or infinity in {name}.")
    return tensor


def trouble(path: Path) -> str:
    """Say what a file is that safetensors cannot read, and what to do: "is empty; …"."""
    try:
        n_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(2048)
        kind = _other_kind(path, start, n_bytes)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return kind or _cut_off(path, start, n_bytes) or UNKNOWN


def _other_kind(path: Path, start: bytes, n_bytes: int) -> str | None:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not n_bytes:
        return "is empty; download it again"
    if start.startswith(_POINTER):
        return "is a Git LFS pointer, not the file that it stands for; fetch that with `git lfs pull`"
    if text.lower().startswith(_PAGE):
        return (
            "is a web page, no weights: the site answered with a page, as for a login; download it in a"
            " browser where you are signed in"
        )
    if text.startswith(b"{"):
        answer = " ".join(text[:120].decode("utf-8", "replace").split())
        return f"is text, no weights, perhaps what a site answered: {answer}"
    if start.startswith(b"PK"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if not any(name.endswith("data.pkl") for name in archive.namelist()):
                    return "is a zip archive; unpack it and name the file in it"
        return PICKLE
    return PICKLE if start[:1] == b"\x80" and start[1:2] in b"\x01\x02\x03\x04\x05" else None


def _cut_off(path: Path, start: bytes, n_bytes: int) -> str | None:
    """Compare a file's length with what its header announces."""
    if n_bytes <= 8:
        return "is cut off in its first bytes; download it again"
    (n_header,) = struct.unpack("<Q", start[:8])
    if not 2 <= n_header <= _MAX_HEADER or start[8:9] != b"{":
        return None
    if n_bytes < 8 + n_header:
        return "is cut off in its header; download it again"
    with path.open("rb") as file:
        file.seek(8)
        n_expected = 8 + n_header + _end_of_tensors(file.read(n_header))
    if n_bytes < n_expected:
        return f"is cut off: {n_bytes:,} of {n_expected:,} bytes are there; download it again"
    return None


def _end_of_tensors(header: bytes) -> int:
    try:
        entries: dict[str, Any] = json.loads(header)
        return max(int(e["data_offsets"][1]) for n, e in entries.items() if n != "__metadata__")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return 0
