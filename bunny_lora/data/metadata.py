"""`metadata.jsonl`: captions beside pictures, written and read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bunny_lora.core.files import is_file, is_inside
from bunny_lora.errors import BunnyLoraError

METADATA = "metadata.jsonl"
MAX_DIGITS = 4000


def metadata_line(file_name: str, text: str) -> str:
    """Return one line of `metadata.jsonl`, its end included."""
    return json.dumps({"file_name": file_name, "text": text}, ensure_ascii=False) + "\n"


def read_rows(data_dir: Path, instance_prompt: str) -> list[tuple[str, str]]:
    """Return (file name, caption) of each line, `instance_prompt` where there is no caption.

    Raises:
        BunnyLoraError: no such file, a line that is broken (names it), a picture that is missing.
    """
    path = data_dir / METADATA
    if not is_file(path):
        raise BunnyLoraError(
            f"No training data: {path} is not there. Prepare it with notebook 01, or set data_dir"
            " to a folder with pictures and a metadata.jsonl."
        )
    rows = []
    for number, row in json_lines(path):
        row = row if isinstance(row, dict) else {}
        name, text = row.get("file_name"), row.get("text") or instance_prompt
        if not isinstance(name, str) or not isinstance(text, str) or not text:
            raise BunnyLoraError(
                f'{path}, line {number}: should read {{"file_name": "a.jpg", "text": "a caption"}}.'
                " Mend the line, or prepare the data again."
            )
        if not is_file(data_dir / name) or not is_inside(data_dir / name, [data_dir.resolve()]):
            raise BunnyLoraError(f"{path}, line {number}: there is no picture {name!r} in the folder.")
        rows.append((name, text))
    if not rows:
        raise BunnyLoraError(f"{path} is empty: there is nothing to train on. Prepare the data again.")
    return rows


def _integer(digits: str) -> int | float:
    """Python refuses to read endless numbers; one of them spoils its own entry only."""
    return int(digits) if len(digits) < MAX_DIGITS else float(digits)


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of the lines that are not blank; the value is None if it is no JSON.

    Raises:
        BunnyLoraError: the file cannot be read, or is not UTF-8.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise BunnyLoraError(f"Could not read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise BunnyLoraError(
            f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8."
        ) from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line, parse_int=_integer)
            except (ValueError, RecursionError):
                yield number, None
