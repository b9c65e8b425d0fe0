"""What a single value of the configuration may be, and how it is recorded and shown."""

from __future__ import annotations

import re
import reprlib
import unicodedata
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field

from bunny_lora.core import paths
from bunny_lora.errors import BunnyLoraError

MAX_NUMBER = 2**63 - 1
Zoom = bool | Literal["only"]
MAX_SHOWN = 100  # Characters of a key in a message.


def _portable(path: str) -> str:
    """Return a path as it is recorded everywhere: without the user's name where that can be.

    From the project root if it lies inside, from `~` if in the home folder; both are found again.
    """
    if any(unicodedata.category(c) == "Cc" for c in path):
        raise ValueError("has a line break or a control character in it")
    try:
        expanded = paths.expanded(path)
    except BunnyLoraError as error:
        raise ValueError(str(error)) from None
    root, home = paths.project_root(), paths.home()
    if expanded.is_absolute() and expanded.is_relative_to(root):
        return expanded.relative_to(root).as_posix()
    if expanded.is_absolute() and home and len(home.parts) > 1 and expanded.is_relative_to(home):
        return f"~/{expanded.relative_to(home).as_posix()}"
    return path


def _own_folder(path: str) -> str:
    if not [part for part in Path(path).parts[path[:1] == "~" :] if part not in ("..", "/")]:
        raise ValueError(f"{path} is the project, your home or a folder around it; name one inside")
    return path


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _no_list_in_words(names: list[str]) -> list[str]:
    """No name of a layer has a comma or a space in it; a list without its brackets has."""
    for name in names:
        if not re.fullmatch(r"[^,\s]+", name):
            raise ValueError(f"{shown(name)} is no layer's name; write several as [to_q, to_v]")
    return names


_Several = Annotated[list[str], Field(min_length=1)]
Texts = Annotated[_Several, BeforeValidator(_as_list, json_schema_input_type=str | _Several)]
"""A list, or a single text for a list of one."""
AnyTexts = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
"""The same, or none at all."""
LayerNames = Annotated[Texts, AfterValidator(_no_list_in_words)]
Recorded = Annotated[str, Field(min_length=1), AfterValidator(_portable)]
OwnFolder = Annotated[Recorded, AfterValidator(_own_folder)]


def split_revision(name: str) -> tuple[str, str | None]:
    """Return "owner/name" and the revision of "owner/name@revision", the hub's way to write both."""
    match = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)@(.+)", name)
    return (match[1], match[2]) if match else (name, None)


def with_revision(repo: str, revision: str | None) -> str:
    """Return what `split_revision` takes apart."""
    return f"{repo}@{revision}" if revision else repo


def kinds_of(annotation: Any) -> set[Any]:
    """Return the types in a union, or the one type, bare of what is annotated to them."""
    if get_origin(annotation) is Annotated:
        return kinds_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(kinds_of, get_args(annotation)))
    return {annotation}


def no_text_in(value: Any, kinds: set[Any]) -> list[Any]:
    """Return what stands where keys of these kinds take text: a bare `yes`, `42` or `{name}`."""
    if not kinds <= {str, list[str], NoneType} or (value is None and NoneType in kinds):
        return []
    parts = value if isinstance(value, list) else [value]
    return [part for part in parts if not isinstance(part, str)]


def is_text(text: str) -> bool:
    """Whether a text can be written to any file and read back the same."""
    return all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") for c in text)


def shown(value: Any) -> str:
    """Return a value as a message shows it: short, whatever it is."""
    try:
        return reprlib.repr(value)
    except Exception:  # A number with more digits than Python writes.
        return f"a {type(value).__name__} that cannot be shown"
