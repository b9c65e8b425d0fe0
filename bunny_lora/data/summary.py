"""What `data_summary.json` says: what was read, what was left out and why, and every picture's hash.

No absolute path and no time, so preparing twice gives the same bytes.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bunny_lora.core import files, paths
from bunny_lora.core.files import is_file, is_inside
from bunny_lora.data.captions import names_lost
from bunny_lora.data.frames import Sample, Source
from bunny_lora.errors import BunnyLoraError

SCHEMA_VERSION = 1
SUMMARY = "data_summary.json"
MAX_SHOWN = 4  # Names of files in one line.


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


def characters_of(samples: Sequence[Sample]) -> dict[str, int]:
    """Return in how many pictures each character is."""
    return dict(sorted(Counter(name for sample in samples for name in sample.characters).items()))


def identity(source: Source, tokenizer: Any) -> dict[str, Any]:
    """Return the part of the summary that must be the same for the data to be the same."""
    settings = {"min_confidence": source.min_confidence, "tokenizer_limit": token_limit(tokenizer)}
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": source.kind,
        "input_sha256": source.digest,
        "characters": characters_of(source.frames),
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


def describe(source: Source, samples: Sequence[Sample], tokenizer: Any) -> dict[str, Any]:
    """Return counts and spreads over what is used, the list of what is not, and what is to be said.

    Args:
        source: what was read.
        samples: what became of its frames, in their order.
        tokenizer: the one that the samples' tokens were counted with.
    """
    frames = source.frames
    confidence = [frame.confidence for frame in frames if frame.confidence is not None]
    sizes = Counter("x".join(map(str, frame.size)) for frame in frames)
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
        "n_instance_prompt": sum(frame.prompted for frame in frames),
        "characters": characters_of(frames),
        "confidence": _spread(confidence) if confidence else None,
        "caption_tokens": caption_tokens(frames, samples, tokenizer),
        "sizes": dict(sorted(sizes.items())),
        "dropped_by_reason": by_reason(source),
        "dropped": dropped,
        "unused": [{"file": item.file, "reason": item.reason} for item in source.unused],
        "notes": source.notes,
    }


def caption_tokens(
    frames: Sequence[Sample], samples: Sequence[Sample], tokenizer: Any
) -> dict[str, Any] | None:
    """Return how long captions are and what of them is cut; the arguments are as in `describe`."""
    tokens = [sample.tokens for sample in samples if sample.tokens is not None]
    limit = token_limit(tokenizer)
    if limit is None:
        return None
    return _spread(tokens) | {
        "limit": limit,
        "n_truncated": sum(n > limit for n in tokens),
        "n_names_moved": sum(a.caption != b.caption for a, b in zip(frames, samples, strict=True)),
        "names_lost": sorted({name for s in samples for name in _lost(s, tokenizer)}),
    }


def _lost(sample: Sample, tokenizer: Any) -> tuple[str, ...]:
    if sample.tokens is None or sample.tokens <= tokenizer.model_max_length:
        return ()
    return names_lost(sample.caption, sample.characters, tokenizer)


def cut_text(tokens: Mapping[str, Any] | None, n_images: int, *, named: bool) -> str:
    """Return in a line how much of the captions the text encoder never sees; empty if nothing.

    Args:
        tokens: as `describe` returns it.
        n_images: how many captions there are.
        named: whether it is known who is in the pictures.
    """
    if not tokens or not tokens["n_truncated"]:
        return ""
    limit, lost = tokens["limit"], tokens["max"] - tokens["limit"]
    line = (
        f"{tokens['n_truncated']} of {n_images} captions are longer than the {limit} tokens that the"
        f" text encoder reads: of the longest, the last {lost} are lost"
    )
    if names := tokens.get("names_lost"):
        return f"{line}, and in some a name: {', '.join(map(repr, names))}"
    if not named:
        return f"{line}, and maybe a name"
    moved = tokens["n_names_moved"]
    return line + f"; no name is, since in {moved} they were put in front" * bool(moved)


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """Return in lines what nobody should miss: captions that were made up, guesses, files not used.

    Args:
        summary: as `describe` returns it; of an older version, it says less.
    """
    n_images, prompted = summary["n_images"], summary.get("n_instance_prompt", 0)
    lines = []
    if "replaced" in summary:
        lines.append(f"This replaces what was prepared from {summary['replaced']}")
    if prompted:
        lines.append(f"{prompted} of {n_images} have no caption and get the instance_prompt for one")
    if not summary["characters"] and prompted < n_images:
        lines.append(
            "nobody is named in these data, so names are not kept in captions, nor judged: tell them,"
            " or the trigger words that captions have, with character_names (--set"
            " 'character_names=[ellie, rex]')"
        )
    lines += summary.get("notes", [])
    if cut := cut_text(summary.get("caption_tokens"), n_images, named=bool(summary["characters"])):
        lines.append(cut)
    by_reason: dict[str, list[str]] = {}
    for item in summary.get("unused", []):
        by_reason.setdefault(item["reason"], []).append(item["file"])
    for reason, names in by_reason.items():
        more = f" and {len(names) - MAX_SHOWN} more" * (len(names) > MAX_SHOWN)
        lines.append(f"not used: {', '.join(names[:MAX_SHOWN])}{more}: {reason}")
    return lines


def sample_from(image: Mapping[str, Any], path: Path, caption: str) -> Sample:
    """Return the sample that an object of `describe_files` is about; empty for a foreign picture."""
    return Sample(
        image.get("frame_id", path.stem),
        path,
        caption,
        tuple(image.get("characters", ())),
        image.get("confidence"),
        image.get("rescued", False),
        tuple(tuple(box) for box in image.get("faces", ())),
        tuple(image.get("size", ())),
        prompted=image.get("prompted", False),
        repeats=image.get("repeats", 1),
    )


def describe_files(samples: Sequence[Sample], text: str, hashes: list[str]) -> dict[str, Any]:
    """Return one object a picture, and the hash of metadata.jsonl, whose content is `text`."""
    images = [
        {
            "file_name": sample.path.name,
            "frame_id": sample.frame_id,
            "characters": list(sample.characters),
            "confidence": sample.confidence,
            "rescued": sample.rescued,
            "faces": [list(box) for box in sample.faces],
            "size": list(sample.size),
            "caption_tokens": sample.tokens,
            "prompted": sample.prompted,
            "repeats": sample.repeats,
            "sha256": sha256,
        }
        for sample, sha256 in zip(samples, hashes, strict=True)
    ]
    return {"images": images, "metadata_sha256": sha256_hex(text.encode())}
