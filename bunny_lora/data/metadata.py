"""Tables with captions beside pictures, as `datasets` reads them: `metadata.jsonl`, `metadata.csv`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bunny_lora.core.files import decoded, is_file
from bunny_lora.data.captions import clean
from bunny_lora.data.images import Finder
from bunny_lora.errors import BunnyLoraError, LeftOutError

METADATA = "metadata.jsonl"
TABLES = (METADATA, "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "prompt")
CSV: dict[str, Any] = {"strict": True, "skipinitialspace": True}
MAX_DIGITS = 4000
MAX_SHOWN_COLUMNS = 10


def metadata_line(file_name: str, text: str) -> str:
    """Return one line of `metadata.jsonl`, its end included."""
    return json.dumps({"file_name": file_name, "text": text}, ensure_ascii=False) + "\n"


def find_table(folder: Path) -> Path | None:
    """Return the table of a folder, `metadata.jsonl` where there are two, or None."""
    return next((folder / name for name in TABLES if is_file(folder / name)), None)


@dataclass(frozen=True)
class Table:
    """The rows of a table by their line, None where one is broken, and the column with the captions.

    `said` tells where captions come from, if that is not the column `text`.
    """

    path: Path
    rows: list[tuple[int, dict[str, Any] | None]]
    column: str
    said: str

    def caption_of(self, row: dict[str, Any]) -> Any:
        """Return what a row holds for a caption, None where there is nothing."""
        return row.get(self.column) if self.column else None

    def broken(self, number: int) -> str:
        """Say what is wrong with a row that has no file_name."""
        if self.path.suffix == ".csv":
            return (
                f"line {number} of {self.path.name} has no file_name, or not the header's columns"
                + (" (captions with commas need quotes)")
            )
        return f"line {number} of {self.path.name} is no JSON object with a file_name"


def read_table(path: Path, caption_column: str | None = None, *, strict: bool = True) -> Table:
    """Read a whole table and settle which of its columns holds the captions.

    Args:
        path: `metadata.jsonl` or `metadata.csv`.
        caption_column: the configuration's; None: `text`, or else `caption` or `prompt`.
        strict: a `caption_column` that the table does not have is an error.

    Raises:
        BunnyLoraError: the file cannot be read or has no such column.
    """
    lines = _csv_rows(path) if path.suffix == ".csv" else json_lines(path)
    rows = [(number, row if isinstance(row, dict) else None) for number, row in lines]
    columns = list(dict.fromkeys(key for _, row in rows for key in row or ()))
    if strict and caption_column and rows and caption_column not in columns:
        raise BunnyLoraError(
            f"{path} has no column {caption_column!r}, which caption_column names. It has"
            f" {_listed(columns)}."
        )
    wanted = [caption_column] if caption_column else []
    column = next((name for name in (*wanted, *CAPTION_COLUMNS) if name in columns), "")
    said = ""
    if column not in ("text", caption_column or "", ""):
        said = f"captions are the column {column!r} of {path.name}, which has no 'text'"
    elif not column and any(row for _, row in rows):
        said = (
            f"{path.name} has no column 'text'. It has {_listed(columns)}; if one of them holds the"
            " captions, name it with caption_column"
        )
    return Table(path, rows, column, said)


def _listed(columns: list[str]) -> str:
    more = f" and {len(columns) - MAX_SHOWN_COLUMNS} more" * (len(columns) > MAX_SHOWN_COLUMNS)
    return ", ".join(repr(clean(name))[:80] for name in columns[:MAX_SHOWN_COLUMNS]) + more


@dataclass(frozen=True)
class Row:
    """A picture that a table lists, with its caption, and whether that is the `instance_prompt`."""

    file_name: str
    text: str
    prompted: bool


def read_rows(
    data_dir: Path,
    instance_prompt: str,
    *,
    caption_column: str | None = None,
    allow_outside_paths: bool = False,
) -> list[Row]:
    """Return what the table of a folder lists, `instance_prompt` where there is no caption.

    Raises:
        BunnyLoraError: no such file, a line that is broken (names it), a picture that is missing.
    """
    path = find_table(data_dir)
    if path is None:
        raise BunnyLoraError(
            f"No training data: {data_dir / METADATA} is not there. Prepare it with notebook 01, or set"
            " data_dir to a folder with pictures and captions."
        )
    table = read_table(path, caption_column, strict=False)
    finder = Finder(data_dir, [], anywhere=allow_outside_paths)
    rows = []
    for number, row in table.rows:
        row = row or {}
        name, own = row.get("file_name"), table.caption_of(row)
        text = own or instance_prompt
        if not isinstance(name, str) or not isinstance(text, str) or not text:
            raise BunnyLoraError(
                f'{path}, line {number}: should read {{"file_name": "a.jpg", "text": "a caption"}}.'
                " Mend the line, or prepare the data again."
            )
        rows.append(Row(_found(finder, name, f"{path}, line {number}"), text, not own))
    if not rows:
        raise BunnyLoraError(f"{path} is empty: there is nothing to train on. Prepare the data again.")
    return rows


def _found(finder: Finder, name: str, where: str) -> str:
    """Return the name of a listed picture as the disk has it."""
    if is_file(finder.base / name) and finder.permits(finder.base / name):
        return name
    try:
        return finder.find(name).relative_to(finder.base).as_posix()
    except (LeftOutError, ValueError) as error:
        reason = f" ({error})" if isinstance(error, LeftOutError) else ""
        raise BunnyLoraError(f"{where}: there is no picture {name!r} in the folder{reason}.") from None


def _integer(digits: str) -> int | float:
    """Python refuses to read endless numbers; one of them spoils its own entry only."""
    return int(digits) if len(digits) < MAX_DIGITS else float(digits)


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of the lines that are not blank; the value is None if it is no JSON.

    Raises:
        BunnyLoraError: the file cannot be read, or is not UTF-8.
    """
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line, parse_int=_integer)
            except (ValueError, RecursionError):
                yield number, None


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, row) of a table with a header; None for a row of another length.

    A caption with a comma that nobody quoted has too many fields: read as it is, it would be cut.
    """
    text = _text(path)
    header = text.partition("\n")[0]
    separator = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, **CSV)
    try:
        for row in reader:
            yield reader.line_num, None if None in row or None in row.values() else row
    except csv.Error as error:
        raise BunnyLoraError(
            f"{path}, after line {reader.line_num}: {error}. Each caption with commas, quotes or line"
            " breaks needs quotes around it; quotes within are doubled."
        ) from None


def _text(path: Path) -> str:
    try:
        return decoded(path.read_bytes())
    except OSError as error:
        raise BunnyLoraError(f"Could not read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise BunnyLoraError(
            f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8."
        ) from None
