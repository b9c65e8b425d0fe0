"""Write training data that any tool can load: pictures, captions and a summary, swapped in whole."""

from __future__ import annotations

import errno
import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from bunny_lora.core import files, paths
from bunny_lora.core.files import is_file, is_inside
from bunny_lora.core.progress import progress
from bunny_lora.data.captions import count_tokens, name_first
from bunny_lora.data.folder import has_captions
from bunny_lora.data.frames import Sample, Source
from bunny_lora.data.images import plain_bytes, plain_suffix
from bunny_lora.data.metadata import METADATA, find_table, metadata_line
from bunny_lora.data.summary import (
    SUMMARY,
    by_reason,
    describe,
    describe_files,
    identity,
    load_summary,
    sha256_hex,
)
from bunny_lora.errors import BunnyLoraError

# What helps against a kind of reason that does not say so itself.
ADVICE = {
    "broken image": "Save broken pictures anew.",
    "failed call": "Run stage 4 again where its calls failed.",
    "invalid entry": "Mend invalid entries where they are named.",
    "low confidence": "A lower min_confidence takes in frames that stage 4 was less sure of.",
    "missing frame": "Copy the frames to where they are looked for: the source's own folder.",
    "no caption": "Write captions, or name one for all of those without with instance_prompt.",
}

T = TypeVar("T")
Plan = dict[Path, Sample]  # From a source's picture to the sample that it becomes.
MAX_STEM_CHARACTERS = 80
# `datasets` takes a file that has one of these words in its name for a part of its own, without texts.
SPLIT_WORDS = re.compile(
    r"(?<![^\W\d_])(train|training|val|valid|validation|dev|test|testing|eval|evaluation)(?![^\W\d_])",
    re.IGNORECASE,
)
NOT_DATA = ("Thumbs.db", "desktop.ini")  # Left by file browsers; so is everything with a leading dot.


def prepare(source: Source, data_dir: Path, *, tokenizer: Any = None, overwrite: bool = False) -> dict:
    """Write pictures, captions and summary, or nothing if that is what lies there already.

    The folder is built anew beside the old one and swapped in whole. One that was changed by hand, or
    that something else wrote, is left alone, or kept as `<data_dir>.backup-<n>` with `overwrite`.

    Args:
        source: what `read_source` returned.
        data_dir: e.g. `training_data/instance_images`; the summary goes to the folder above.
        tokenizer: the text encoder's; with it, names are moved to where cutting cannot lose them.
        overwrite: replace a folder that is not as we left it.

    Returns:
        The summary, with `"unchanged": True` added if nothing was written.

    Raises:
        BunnyLoraError: no usable picture, a folder that must not be replaced, or a full disk.
    """
    data_dir = paths.resolve(data_dir)
    _refuse_impossible(source, data_dir)
    old, key = load_summary(data_dir), identity(source, tokenizer)
    difference = _difference(data_dir, old)
    intact = is_file(data_dir / METADATA) and not difference
    if old and intact and all(old.get(name) == value for name, value in key.items()):
        return old | {"unchanged": True}
    plan = _plan(source.frames, data_dir, tokenizer)
    samples = list(plan.values())
    text = "".join(metadata_line(sample.path.name, sample.caption) for sample in samples)
    if difference and _is_planned(data_dir, plan, text):
        difference = ""
    if difference and not overwrite:
        raise BunnyLoraError(_refusal(data_dir, difference))
    hashes = _write(plan, text, data_dir, keep_old=bool(difference))
    summary = key | describe(source, samples, tokenizer) | describe_files(samples, text, hashes)
    files.write_json(data_dir.parent / SUMMARY, summary)
    return summary


def _refuse_impossible(source: Source, data_dir: Path) -> None:
    if not source.frames:
        raise BunnyLoraError(_nothing_usable(source))
    if is_inside(paths.project_root(), [data_dir.resolve()]):
        raise BunnyLoraError(
            f"data_dir {data_dir} holds the whole project; choose a folder of its own."
        )
    origin = source.origin.resolve()
    if source.kind == "folder" and is_inside(data_dir.parent, [origin]):
        raise BunnyLoraError(
            f"data_dir {data_dir} lies in the source, {source.origin}, and would be a part of it the"
            " next time. Choose another data_dir."
        )
    if any(is_inside(frame.path, [data_dir.resolve()]) for frame in source.frames):
        raise BunnyLoraError(
            f"The source's pictures lie in data_dir itself ({data_dir}). Choose another data_dir, or"
            " train on the folder as it is."
        )


def _nothing_usable(source: Source) -> str:
    """Say why nothing is usable: each kind of reason with its first case, and what helps against it."""
    counts = by_reason(source)
    kinds = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "nothing in it"
    first = {item.reason.partition(":")[0]: item for item in reversed(source.dropped)}
    cases = "".join(f" {first[kind].frame_id}: {first[kind].reason}." for kind in counts)
    advice = "".join(f" {ADVICE[kind]}" for kind in counts if kind in ADVICE)
    return f"No usable picture in {source.origin}: {kinds}.{cases}{advice}"


def _present(data_dir: Path) -> set[str]:
    names = {path.name for path in data_dir.iterdir()} if data_dir.is_dir() else set()
    return {name for name in names if not name.startswith(".") and name not in NOT_DATA}


def _difference(data_dir: Path, old: dict | None) -> str:
    """Return in words how the folder differs from what we left there; empty if it does not."""
    present = _present(data_dir)
    if not present:
        return ""
    if old is None:
        return "it holds files that were not written by this step"
    left = {image["file_name"]: image["sha256"] for image in old["images"]}
    left[METADATA] = old["metadata_sha256"]
    kept = present & set(left)
    changed = {name for name in kept if sha256_hex((data_dir / name).read_bytes()) != left[name]}
    changed |= present.symmetric_difference(left)
    if METADATA in changed:
        return f"the captions in {METADATA} were changed by hand since it was prepared"
    names = ", ".join(sorted(changed)[:3])
    return f"pictures were changed by hand since it was prepared ({names})" if changed else ""


def _is_planned(data_dir: Path, plan: Plan, text: str) -> bool:
    """Whether the folder is just what would be written: stopped between it and the summary."""
    return (
        _present(data_dir) == {METADATA, *(sample.path.name for sample in plan.values())}
        and (data_dir / METADATA).read_bytes() == text.encode()
        and all(s.path.read_bytes() == plain_bytes(picture) for picture, s in plan.items())
    )


def _refusal(data_dir: Path, difference: str) -> str:
    if find_table(data_dir) or has_captions(data_dir):
        instead = "To train on it as it is, go on without preparing."
    else:
        instead = (
            f"It has no captions, neither a {METADATA} nor texts beside its pictures, so it cannot be"
            " trained on as it is. To make training data of it, name it as the source, and another"
            " folder as data_dir."
        )
    return (
        f"{data_dir} would be replaced, but {difference}. {instead} To prepare it anew, pass"
        f" overwrite=True (--overwrite): what is there now is then kept as {_backup(data_dir).name}"
        " beside it."
    )


def _backup(data_dir: Path) -> Path:
    number = 1
    while (backup := data_dir.with_name(f"{data_dir.name}.backup-{number}")).exists():
        number += 1
    return backup


def fitted(sample: Sample, tokenizer: Any) -> Sample:
    """Move names to where cutting cannot lose them, and count the tokens."""
    caption = name_first(sample.caption, sample.characters, tokenizer)
    return replace(sample, caption=caption, tokens=count_tokens(caption, tokenizer))


def _plan(frames: list[Sample], data_dir: Path, tokenizer: Any) -> Plan:
    taken: set[str] = set()
    plan = {}
    for frame in frames:
        sample = replace(frame, path=data_dir / _unchanged(_file_name, frame.path, taken))
        plan[frame.path] = sample if tokenizer is None else fitted(sample, tokenizer)
    return plan


def _unchanged(use: Callable[..., T], path: Path, *arguments: Any) -> T:
    """Use a picture that was good when the source was read."""
    try:
        return use(path, *arguments)
    except Exception as error:  # Pillow's decoders raise whatever they trip over.
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise
        raise BunnyLoraError(
            f"{path.name} changed while it was read. What was prepared before is untouched: run the"
            " same command again."
        ) from error


def _file_name(path: Path, taken: set[str]) -> str:
    """Return a name that every system takes, and that no frame has yet on any of them."""
    stem = (
        re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", path.stem))[:MAX_STEM_CHARACTERS].strip(
            "._-"
        )
        or "image"
    )
    stem = SPLIT_WORDS.sub(r"x\1", stem)
    suffix = plain_suffix(path) or ".png"
    name, number = stem + suffix, 1
    while name.lower() in taken:  # Windows and macOS take a.jpg and A.jpg for the same file.
        number += 1
        name = f"{stem}_{number}{suffix}"
    taken.add(name.lower())
    return name


def _write(plan: Plan, text: str, data_dir: Path, *, keep_old: bool) -> list[str]:
    """Swap in the new folder, the old one kept as a backup or dropped; return the pictures' hashes."""
    backup = _backup(data_dir)
    try:
        with files.atomic_path(data_dir) as part:
            hashes = _build(plan, text, part)
            if keep_old:
                data_dir.rename(backup)
    except BaseException:
        if backup.exists() and not data_dir.exists():
            backup.rename(data_dir)
        raise
    return hashes


def _build(plan: Plan, text: str, folder: Path) -> list[str]:
    folder.mkdir()
    hashes = []
    for picture, sample in progress(plan.items(), desc="Writing training images", delay=2.0):
        data = _unchanged(plain_bytes, picture)
        (folder / sample.path.name).write_bytes(data)
        hashes.append(sha256_hex(data))
    (folder / METADATA).write_bytes(text.encode())
    return hashes
