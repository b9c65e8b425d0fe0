"""A folder of pictures and captions as people's tools leave it: every file is used, or listed.

Captions are rows of a table, or texts of the picture's name beside it, as kohya's trainers keep them;
likewise pictures in a sub-folder called `10_name class` count ten times. Hidden files are left alone.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from bunny_lora.core.files import decoded, is_file, is_folder
from bunny_lora.data.captions import Entry, clean
from bunny_lora.data.frames import Unused
from bunny_lora.data.images import (
    HOW_TO_ALLOW,
    OUTSIDE,
    SUFFIXES,
    UNREAD,
    Finder,
    kind_of,
    name_key,
    unread,
)
from bunny_lora.data.metadata import METADATA, TABLES, Table, read_table
from bunny_lora.errors import LeftOutError

CAPTION_ENDINGS = (".txt", ".caption")
# Longer numbers are years, and cameras call their folders 100_FUJI.
REPEATS = re.compile(r"(?![1-9]\d\d_[A-Z0-9]{4}$)(\d{1,3})_(.+)")
MASK_OF = re.compile(r"(.+?)([-_.]mask|-masklabel|-condlabel)", re.IGNORECASE)
MASK_FOLDERS = ("mask", "masks")
NO_DATA = ("Thumbs.db", "desktop.ini", "__MACOSX")  # Left by file browsers and archives.

# What may be captions or metadata, and what other trainers leave beside pictures.
TEXTUAL = (
    *(".json", ".jsonl", ".csv", ".tsv", ".parquet", ".xml", ".yaml", ".yml", ".toml", ".xlsx"),
    *(".md", ".text", ".tags", ".tag", ".cap", ".captions", ".wildcard"),
)
CACHES = (".npz", ".npy", ".safetensors", ".pt", ".pth", ".ckpt", ".bin")

READ = f"{METADATA}, metadata.csv, and .txt or .caption files of the pictures' names"
CAPTION_NOT_READ = f"beside its picture, but not read; captions are read from {READ}"
TABLE_NOT_READ = f"metadata of a kind that is not read; captions are read from {READ}"


@dataclass
class Listing:
    """What a folder comes to: pictures usable or not, the files beside them, and what to say of all."""

    entries: list[Entry] = field(default_factory=list)
    unused: list[Unused] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def has_pictures(folder: Path) -> bool:
    """Whether there is a picture anywhere in a folder, of a format that is read or not."""
    known = {*SUFFIXES, *UNREAD}
    return any(path.suffix.lower() in known or path.is_symlink() for path in _all(folder))


def has_captions(folder: Path) -> bool:
    """Whether there are pictures anywhere in a folder, and captions of a kind that is read."""
    captions = any(
        path.suffix.lower() in CAPTION_ENDINGS or path.name in TABLES for path in _all(folder)
    )
    return captions and has_pictures(folder)


def _all(folder: Path) -> Iterator[Path]:
    """Yield all that is visible in a folder and below; what links lead to may be anything."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        yield from (Path(place) / name for name in (*folders, *names) if not _is_hidden(name))


def read_folder(
    finder: Finder, *, instance_prompt: str = "", caption_column: str | None = None
) -> Listing:
    """Return what is in `finder.base` and the folders in it: rows of tables, then other pictures.

    Captions here were written by a person, so short ones ("ellie, forest") are as good as long ones.

    Args:
        finder: looks for the pictures of tables, and says which links may be followed.
        instance_prompt: the caption of pictures that have none.
        caption_column: of tables, as in `read_table`.

    Raises:
        BunnyLoraError: a table cannot be read.
    """
    reader = _Reader(finder, clean(instance_prompt), caption_column)
    for name in TABLES:
        for path in [path for path in reader.files if path.name == name]:
            reader.add_table(path)
    for path in [path for path in reader.files if path.suffix.lower() in SUFFIXES]:
        reader.add_picture(path)
    return reader.finish()


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in NO_DATA


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


class _Reader:
    """One pass over a folder; `listing` grows, `used` are the files that need no reason any more."""

    def __init__(self, finder: Finder, instance_prompt: str, caption_column: str | None) -> None:
        self.folder, self.finder = finder.base, finder
        self.instance_prompt, self.caption_column = instance_prompt, caption_column
        self.listing, self.used = Listing(), set[Path]()
        self.listed, self.missing = set[Path](), dict[str, str]()
        self.by_folder: Counter[str] = Counter()
        self.files = list(self._walk(self.folder, {self.folder}))
        self.texts, self.stems = defaultdict[Any, list[Path]](list), defaultdict[Any, set[str]](set)
        for path in self.files:
            if path.suffix.lower() in CAPTION_ENDINGS:
                self.texts[path.parent, name_key(path.name)].append(path)
            elif path.suffix.lower() in SUFFIXES:
                self.stems[path.parent, name_key(path.stem)].add(_nfc(path.stem))

    # ------------------------------------------------------------------------ files

    def _walk(self, folder: Path, seen: set[Path]) -> Iterator[Path]:
        """Yield the files that may be read, sorted; list the links that may not be followed."""
        try:
            paths = sorted(path for path in folder.iterdir() if not _is_hidden(path.name))
        except OSError as error:
            self._leave(folder, f"cannot be read: {error.strerror}")
            return
        if folder.name == "reg" and any(REPEATS.fullmatch(path.name) for path in paths):
            self._leave(folder, "regularisation images: see prior_preservation.class_data_dir")
            return
        for path in paths:
            if path.is_symlink() and not self.finder.permits(path):
                self._leave(path, f"{OUTSIDE}: a link ({HOW_TO_ALLOW})")
            elif is_file(path):
                yield path
            elif not is_folder(path):
                self._leave(path, "a link to nothing, or no file")
            elif path.resolve() in seen:
                self._leave(path, "a link to a folder that is read already")
            else:
                seen.add(path.resolve())
                yield from self._walk(path, seen)

    def _shown(self, path: Path) -> str:
        inside = path.is_relative_to(self.folder)
        return path.relative_to(self.folder).as_posix() if inside else str(path)

    def _leave(self, path: Path, reason: str, frame_id: str = "") -> None:
        """A picture is left out, anything else is a file that nobody uses."""
        self.used.add(path)
        if frame_id or path.suffix.lower() in SUFFIXES:
            frame_id = frame_id or clean(path.stem) or clean(path.name)
            self.listing.entries.append(Entry(frame_id, self._shown(path), reason=reason))
        else:
            self.listing.unused.append(Unused(clean(self._shown(path)), reason))

    # ------------------------------------------------------------------------ tables

    def add_table(self, path: Path) -> None:
        """Add an entry for each row; a second table of the same folder is left for `finish`."""
        if path.name != METADATA and path.with_name(METADATA) in self.used:
            return
        table = read_table(path, self.caption_column)
        self.used.add(path)
        self.listing.notes += [table.said] * bool(table.said)
        for number, row in table.rows:
            self._add_row(table, number, row or {})

    def _add_row(self, table: Table, number: int, row: dict[str, Any]) -> None:
        name, text = row.get("file_name"), table.caption_of(row)
        if not isinstance(name, str):
            reason = f"invalid entry: {table.broken(number)}"
            self.listing.entries.append(Entry(f"line {number}", "", reason=reason))
            return
        frame_id = clean(PureWindowsPath(name).stem) or clean(name)
        path = table.path.parent / name
        try:
            if not (is_file(path) and self.finder.permits(path)):
                path = self.finder.find(name)
        except LeftOutError as error:
            self.missing[name_key(PureWindowsPath(name).name)] = clean(name)
            self.listing.entries.append(Entry(frame_id, "", reason=clean(str(error))))
            return
        self.listed |= {path, path.resolve()}
        if text is not None and not isinstance(text, str):
            kind = type(text).__name__
            reason = (
                f"invalid entry: {table.column!r} in line {number} of {table.path.name} is a {kind}"
            )
            self._leave(path, reason, frame_id)
        else:
            self._add(path, frame_id, clean(text or ""))

    # ------------------------------------------------------------------------ pictures

    def add_picture(self, path: Path) -> None:
        """Add a picture unless a table has listed it; a mask is no picture of its own."""
        if path in self.used or path in self.listed:
            self.used.add(path)
        elif picture := self._masked(path):
            self.used.add(path)
            reason = f"a mask, which is not used: of {picture}"
            self.listing.unused.append(Unused(clean(self._shown(path)), reason))
        elif (key := name_key(path.name)) in self.missing:
            self._leave(
                path, f"unclear caption: a table's {self.missing[key]} is this picture or another"
            )
        else:
            self._add(path, clean(path.stem) or clean(path.name), "")

    def _masked(self, path: Path) -> str:
        """Return the name that a mask shares with a picture, else nothing."""
        match = MASK_OF.fullmatch(path.stem)
        if match and (path.parent, name_key(match[1])) in self.stems:
            return clean(match[1])
        if path.parent.name.lower() not in MASK_FOLDERS or path.parent == self.folder:
            return ""
        key = name_key(path.stem)
        others = (place for place, stem in self.stems if stem == key and place != path.parent)
        return clean(path.stem) if any(others) else ""

    def _add(self, path: Path, frame_id: str, caption: str) -> None:
        """Add an entry with the caption of a table's row, else of a text beside, else what is left."""
        self.used.add(path)
        repeats, words = self._counted(path)
        prompted = False
        try:
            caption = caption or self._text_beside(path)
            if not repeats:
                raise LeftOutError("no repeats: its folder's name says 0 times")
        except LeftOutError as left_out:
            self._leave(path, str(left_out), frame_id)
            return
        if not caption and words:
            caption, self.by_folder[words] = words, self.by_folder[words] + 1
        elif not caption:
            caption, prompted = self.instance_prompt, True
        reason = (
            "" if caption else "no caption: no row of a table, no text beside it, no instance_prompt"
        )
        entry = Entry(frame_id, self._shown(path), caption, reason, prompted=prompted, repeats=repeats)
        self.listing.entries.append(entry)

    def _text_beside(self, picture: Path) -> str:
        path = self._text_file(picture)
        if path is None:
            return ""
        self.used.add(path)
        try:
            text = clean(decoded(path.read_bytes()))
        except (OSError, UnicodeDecodeError):
            raise LeftOutError(f"invalid entry: the caption {path.name} is not UTF-8 text") from None
        if not any(character.isalpha() for character in text):
            what = "numbers, as of boxes" if text else "empty"
            self.listing.unused.append(Unused(clean(self._shown(path)), f"no caption: {what}"))
            return ""
        return text

    def _text_file(self, picture: Path) -> Path | None:
        """Return `a.txt` or `a.png.txt`, in any Unicode form and case unless in doubt whose it is."""
        clear = len(self.stems[picture.parent, name_key(picture.stem)]) < 2
        for ending in CAPTION_ENDINGS:
            for base in (picture.stem, picture.name):
                found = self.texts.get((picture.parent, name_key(base + ending)), [])
                same = [path for path in found if _nfc(path.stem) == _nfc(base)]
                if same or (len(found) == 1 and clear):
                    return (same or found)[0]
        return None

    def _counted(self, picture: Path) -> tuple[int, str]:
        """Return how often a picture counts, and the words that its folder's name says of it."""
        above = [place.name for place in picture.parents if place.is_relative_to(self.folder)]
        match = next(filter(None, map(REPEATS.fullmatch, above)), None)
        return (int(match[1]), clean(match[2])) if match else (1, "")

    # ------------------------------------------------------------------------ what is left

    def finish(self) -> Listing:
        """List every file that was not used, and say what folders' names have added."""
        for path in self.files:
            if path not in self.used:
                self._list(path)
        for words, count in self.by_folder.items():
            note = f"{count} without a caption of their own have their folder's name as one: {words!r}"
            self.listing.notes.append(note)
        repeats = Counter(entry.repeats for entry in self.listing.entries if not entry.reason)
        if set(repeats) - {1}:
            times = ", ".join(f"{n} of them {repeat} times" for repeat, n in sorted(repeats.items()))
            self.listing.notes.append(f"folders' names say how often a picture counts: {times}")
        return self.listing

    def _list(self, path: Path) -> None:
        suffix, name = path.suffix.lower(), self._shown(path)
        if suffix in UNREAD:
            reason = unread(clean(path.name), UNREAD[suffix])
            self.listing.entries.append(Entry(clean(path.stem), "", reason=reason))
            return
        self.listing.unused.append(Unused(clean(name), self._why_unused(path)))

    def _why_unused(self, path: Path) -> str:
        suffix = path.suffix.lower()
        if suffix in CAPTION_ENDINGS:
            other = "its picture has another caption, or it may be another's"
            return other if self._is_beside_picture(path) else "a text of no picture's name"
        if path.name in TABLES:
            return f"{METADATA} lies beside it"
        if kind := kind_of(path):
            return f"{kind} under an ending that is no picture's; rename it"
        if suffix in TEXTUAL:
            return CAPTION_NOT_READ if self._is_beside_picture(path) else TABLE_NOT_READ
        return "a cache or weights" if suffix in CACHES else "no picture, no caption"

    def _is_beside_picture(self, path: Path) -> bool:
        """Whether there is a picture for `a.txt` or `a.png.txt`."""
        stems = (path.stem, Path(path.stem).stem)
        return any((path.parent, name_key(stem)) in self.stems for stem in stems)
