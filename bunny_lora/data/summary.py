"""What `data_summary.json` says: what was read, what was left out and why, and every picture's hash.

No absolute path and no time, so preparing twice gives the same bytes.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bunny_lora.core import files, paths
from bunny_lora.core.files import is_file, is_inside
from bunny_lora.data.frames import Frame, Source
from bunny_lora.errors import BunnyLoraError

SCHEMA_VERSION = 1
SUMMARY = "data_summary.json"


@dataclass(frozen=True)
class Item:
    """One picture to be written, and its line of metadata."""

    frame: Frame
    file_name: str
    text: str
    tokens: int | None


def load_summary(data_dir: Path) -> dict | None:
    """Return what `prepare` wrote about `data_dir`; None if there is nothing of ours.

    Raises:
        BunnyLoraError: there is a file of that name that is not JSON.
    """
    path = paths.resolve(data_dir).parent / SUMMARY
    try:
        summary = files.read_json(path) if is_file(path) else None
    except BunnyLoraError as error:
        raise BunnyLoraError(f"{error} Delete it, and prepare again with overwrite=True.") from None
    ours = isinstance(summary, dict) and summary.get("schema_version") == SCHEMA_VERSION
    return summary if ours else None


def sha256_hex(data: bytes) -> str:
    """Return what the `sha256sum` program prints for these bytes."""
    return hashlib.sha256(data).hexdigest()


def by_reason(source: Source) -> dict[str, int]:
    """Count what was left out by the kind of its reason, the part before the colon."""
    counts = Counter(item.reason.partition(":")[0] for item in source.dropped)
    return dict(sorted(counts.items()))


def token_limit(tokenizer: Any) -> int | None:
    """Return how many tokens the text encoder reads; None without a tokenizer."""
    return None if tokenizer is None else int(tokenizer.model_max_length)


def identity(source: Source, tokenizer: Any) -> dict[str, Any]:
    """Return the part of the summary that must be the same for the data to be the same."""
    settings = {"min_confidence": source.min_confidence, "tokenizer_limit": token_limit(tokenizer)}
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": source.kind,
        "input_sha256": source.digest,
        "settings": settings,
    }


def _shown(path: Path, source: Source) -> str:
    """Return `path` from the project root, or for a source elsewhere from the folder that holds it."""
    if is_inside(path, [paths.project_root().resolve()]):
        shown = paths.relative(path)
    else:
        around, path = source.origin.resolve().parent, path.resolve()
        shown = path.relative_to(around).as_posix() if path.is_relative_to(around) else path.name
    return shown.encode("utf-8", "replace").decode()  # Names on disk need not be valid text.


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def describe(source: Source, items: list[Item], tokenizer: Any) -> dict[str, Any]:
    """Return counts and spreads over what is used, and the list of what is not."""
    frames = source.frames
    confidence = [frame.confidence for frame in frames if frame.confidence is not None]
    names = Counter(name for frame in frames for name in frame.characters)
    sizes = Counter(f"{frame.size[0]}x{frame.size[1]}" for frame in frames)
    dropped = [
        {
            "frame_id": item.frame_id,
            "path": _shown(item.path, source) if item.path else None,
            "reason": item.reason,
        }
        for item in source.dropped
    ]
    return {
        "source": _shown(source.origin, source),
        "n_entries": len(frames) + len(dropped),
        "n_images": len(frames),
        "n_rescued": sum(frame.rescued for frame in frames),
        "characters": dict(sorted(names.items())),
        "confidence": _spread(confidence) if confidence else None,
        "caption_tokens": _tokens(items, token_limit(tokenizer)),
        "sizes": dict(sorted(sizes.items())),
        "dropped_by_reason": by_reason(source),
        "dropped": dropped,
    }


def _tokens(items: list[Item], limit: int | None) -> dict[str, Any] | None:
    tokens = [item.tokens for item in items if item.tokens is not None]
    if limit is None:
        return None
    return _spread(tokens) | {
        "limit": limit,
        "n_truncated": sum(n > limit for n in tokens),
        "n_names_moved": sum(item.text != item.frame.caption for item in items),
    }


def describe_files(items: list[Item], text: str, hashes: list[str]) -> dict[str, Any]:
    """Return one object a picture, and the hash of metadata.jsonl, whose content is `text`."""
    images = [
        {
            "file_name": item.file_name,
            "frame_id": item.frame.frame_id,
            "characters": list(item.frame.characters),
            "confidence": item.frame.confidence,
            "rescued": item.frame.rescued,
            "faces": [list(box) for box in item.frame.faces],
            "size": list(item.frame.size),
            "caption_tokens": item.tokens,
            "sha256": sha256,
        }
        for item, sha256 in zip(items, hashes, strict=True)
    ]
    return {"images": images, "metadata_sha256": sha256_hex(text.encode())}
