"""Find what there is to train on, clean it, and say what was left out and why.

A source is a run of the host pipeline's stage 4 (`outputs/<run>/llm_analysis/llm_analysis.json`, one
object a frame) or a plain folder of pictures with captions. Nothing is written here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bunny_lora.core import files, paths
from bunny_lora.core.files import is_file, is_folder
from bunny_lora.core.progress import progress
from bunny_lora.data.captions import Entry, clean, entry_from_record, names_said
from bunny_lora.data.folder import Listing, has_pictures, read_folder
from bunny_lora.data.frames import Dropped, Sample, Source, unseen
from bunny_lora.data.images import Finder, inspect
from bunny_lora.data.metadata import _integer, find_table
from bunny_lora.errors import BunnyLoraError, LeftOutError

RUN_JSON = Path("llm_analysis") / "llm_analysis.json"


def find_source(name: str = "auto") -> Path:
    """Return the stage-4 JSON, or the folder of pictures, that `name` stands for.

    Args:
        name: "auto" for the newest stage-4 run under `outputs/`; "bunny-world" for the demo's film; the
            name of a run; or the path (from the project root or the working folder) of a run folder, of
            its JSON, or of a folder of pictures.

    Raises:
        BunnyLoraError: there is no such thing; says what there is.
    """
    if name == "auto":
        return _newest_run()
    if name == "bunny-world":
        return _demo_film()
    if found := _as_run(paths.project_root() / "outputs" / name):
        return found
    for path in (paths.resolve(name), Path.cwd() / name, paths.project_root() / "outputs" / name):
        if found := _as_source(path):
            return found
    raise BunnyLoraError(_unknown(name))


def _all_runs() -> list[Path]:
    return sorted(paths.project_root().glob(f"outputs/*/{RUN_JSON.as_posix()}"))


def _newest_run() -> Path:
    if found := _all_runs():
        return max(found, key=lambda path: path.stat().st_mtime)
    raise BunnyLoraError(
        f"No stage-4 run: looked for outputs/*/{RUN_JSON.as_posix()} under {paths.project_root()}."
        " Copy a run's folder into outputs/, or name a run or a folder of pictures with `source:`"
        " (source: bunny-world is the demo's own film)."
    )


def _demo_film() -> Path:
    if is_file(path := paths.demo_film_dir() / RUN_JSON):
        return path
    raise BunnyLoraError(
        f"The demo's film is not drawn yet: no {paths.relative(path)}. `make demo` draws it."
    )


def _as_run(path: Path) -> Path | None:
    """Return the JSON of the stage-4 run at `path`, or None."""
    for json_path in (path / RUN_JSON, path / RUN_JSON.name):
        if is_file(json_path):
            return json_path
    return path if is_file(path) and path.suffix == ".json" else None


def _as_source(path: Path) -> Path | None:
    """Return the JSON of the stage-4 run at `path`, or `path` if a folder of pictures, or None."""
    if found := _as_run(path):
        return found
    return path if is_folder(path) and (find_table(path) or has_pictures(path)) else None


def _unknown(name: str) -> str:
    known = [path.parent.parent.name for path in _all_runs()]
    near = difflib.get_close_matches(name, known, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    listed = f"Runs under outputs/: {', '.join(known)}." if known else "There is no run under outputs/."
    return (
        f"No source {name[:200]!r}: neither a run under {paths.project_root() / 'outputs'}, nor the"
        f" path of a run, of an llm_analysis.json, or of a folder with pictures.{hint} {listed}"
    )


def read_source(
    path: Path,
    *,
    min_confidence: float = 0.5,
    instance_prompt: str = "",
    allow_outside_paths: bool = False,
    caption_column: str | None = None,
    character_names: Sequence[str] = (),
) -> Source:
    """Read and clean a source; every picture in `frames` has been decoded once and is good.

    Pictures are read only inside the project root, the run folder, or the folder named, unless
    `allow_outside_paths`.

    Args:
        path: what `find_source` returns, or a run folder.
        min_confidence: stage-4 entries below it are left out; a missing confidence counts as 0.
        instance_prompt: the caption of pictures in a plain folder that have none.
        allow_outside_paths: read a picture wherever its recorded path leads.
        caption_column: which column of a folder's table holds the captions; None: `text`, or else
            `caption` or `prompt`.
        character_names: who is in a picture if its caption has the name, beside who is named already.

    Raises:
        BunnyLoraError: there is no source, or it cannot be read as a whole.
    """
    found = _as_source(path)
    if found is None:
        raise BunnyLoraError(_unknown(str(path)))
    if found.is_dir():
        kind, folder, threshold = "folder", found, None
    else:
        kind, threshold = "stage-4", min_confidence
        folder = found.parent.parent if found.parent.name == RUN_JSON.parent.name else found.parent
    finder = Finder(folder, [paths.project_root()], anywhere=allow_outside_paths)
    if kind == "folder":
        listing = read_folder(finder, instance_prompt=instance_prompt, caption_column=caption_column)
        raw = json.dumps([_told_apart_by(entry) for entry in listing.entries]).encode()
    else:
        raw, records = _read_list(found)
        numbered = enumerate(records, 1)
        listing = Listing([entry_from_record(record, n, min_confidence) for n, record in numbered])
        known = (record.get("characters_identified") for record in records if isinstance(record, dict))
        listing.notes += names_said(known)
    frames, dropped = _look_for(listing.entries, finder)
    frames = [frame.naming(character_names) for frame in frames]
    listing.notes += unseen(character_names, frames)
    digest = _digest(raw, frames)
    return Source(folder, kind, frames, dropped, digest, threshold, listing.unused, listing.notes)


def _told_apart_by(entry: Entry) -> list[Any]:
    return [entry.recorded, entry.caption, *[entry.repeats] * (entry.repeats != 1)]


def _look_for(entries: list[Entry], finder: Finder) -> tuple[list[Sample], list[Dropped]]:
    frames: dict[Path, Sample] = {}
    dropped = []
    looked: dict[str, tuple[Path | None, tuple[int, int], str]] = {}
    for entry in progress(entries, desc="Checking frames", delay=2.0):
        if entry.recorded not in looked:
            looked[entry.recorded] = _look(finder, entry.recorded)
        path, size, problem = looked[entry.recorded]
        reason = entry.reason or problem
        if path in frames and not reason:
            reason = f"listed twice: the same picture as {frames[path].frame_id}"
        if path is None or reason:
            dropped.append(Dropped(entry.frame_id, path, reason))
        else:
            frames[path] = _sample(entry, path, size)
    return list(frames.values()), dropped


def _sample(entry: Entry, path: Path, size: tuple[int, int]) -> Sample:
    said = {field.name: getattr(entry, field.name) for field in fields(Entry)}
    del said["recorded"], said["reason"]
    return Sample(path=path, size=size, **said)


def _look(finder: Finder, recorded: str) -> tuple[Path | None, tuple[int, int], str]:
    try:
        path = finder.find(recorded)
        return path, inspect(path), ""
    except LeftOutError as left_out:
        return None, (0, 0), clean(str(left_out))


def _digest(raw: bytes, frames: list[Sample]) -> str:
    digest = hashlib.sha256(raw)
    for frame in frames:
        digest.update(files.sha256(frame.path).encode())
    return digest.hexdigest()


def _read_list(path: Path) -> tuple[bytes, list[Any]]:
    again = "Let stage 4 finish or run it again, or name another run with `source:`."
    try:
        raw = path.read_bytes()
        # From bytes: takes a byte-order mark, and UTF-16 too.
        records = json.loads(raw, parse_int=_integer)
    except OSError as error:
        raise BunnyLoraError(f"Could not read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise BunnyLoraError(f"{path} is not UTF-8 text (byte {error.start}). {again}") from None
    except (ValueError, RecursionError) as error:
        raise BunnyLoraError(f"{path} is cut off or not JSON: {error}. {again}") from None
    if not isinstance(records, list):
        kind = type(records).__name__
        raise BunnyLoraError(f"{path} holds a {kind}, not a list with one object a frame. {again}")
    if not records:
        raise BunnyLoraError(f"{path} is an empty list: stage 4 described no frame. {again}")
    return raw, records
