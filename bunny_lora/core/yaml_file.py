"""Read YAML that a person wrote, or that somebody sent: strict, small, and with every mistake named.

PyYAML alone keeps the last of two equal keys in silence, unfolds a few lines of anchors into gigabytes
("billion laughs"), and makes 83 of 0123, 630 of 10:30 and a date of a folder called 2026-01-31.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from bunny_lora.core.files import decoded
from bunny_lora.core.values import shown
from bunny_lora.errors import BunnyLoraError

SECTION = "finetuning"
MAX_CHARACTERS = 10_000_000
MAX_DEPTH = 50
MAX_NODES = 100_000
WIDTH = 100  # Of a line with a comment.


# Octal numbers, numbers to the base of 60 and dates, none of which we have a key for.
AS_WRITTEN = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?|[0-9]{4}-[0-9]{1,2}-.+")


class _Loader(yaml.SafeLoader):
    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """Return the tag of a value; as YAML 1.2 has it, what only 1.1 takes for a number is text."""
        if kind is yaml.ScalarNode and implicit[0] and AS_WRITTEN.fullmatch(value):
            return self.DEFAULT_SCALAR_TAG
        return super().resolve(kind, value, implicit)


def parse_yaml(text: str) -> Any:
    """Return what YAML text says.

    Raises:
        ValueError: it is no YAML, too large or nested too deeply, or has a key of ours twice.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it is longer than {MAX_CHARACTERS:,} characters")
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is not None:
            _weigh(root, {}, 0)
            _refuse_double_keys(root, inside=False)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_value(text: str) -> Any:
    """Return what one value says that stands alone, on a command line, where nobody writes comments.

    Raises:
        ValueError: as for `parse_yaml`, or a part of it would be lost as a comment.
    """
    value = parse_yaml(text)
    node = yaml.compose(text, Loader=_Loader)
    if text[node.end_mark.index if node else 0 :].strip():
        raise ValueError("# begins a comment there; a value with # in it stands in quotes")
    return value


def read_section(path: Path) -> dict[str, Any]:
    """Return the raw `finetuning:` section of a YAML file.

    Raises:
        BunnyLoraError: no such file, no YAML, or no such section.
    """
    try:
        data = parse_yaml(decoded(path.read_bytes()))
    except OSError as error:
        raise BunnyLoraError(f"No configuration at {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8."
        raise BunnyLoraError(message) from None
    except ValueError as error:  # An impossible name (NUL) too.
        raise BunnyLoraError(f"{path} is not a YAML file we can read: {error}") from error
    if not isinstance(data, dict) or SECTION not in data:
        raise BunnyLoraError(f"{path} has no `finetuning:` section; see params/cpu.yaml for one.")
    section = {} if data[SECTION] is None else data[SECTION]  # All commented out: defaults.
    if not isinstance(section, dict):
        raise BunnyLoraError(
            f"{path}: `finetuning:` holds no keys but {shown(section)}; see params/cpu.yaml."
        )
    return section


def add_comments(text: str, comments: Mapping[str, str]) -> str:
    """Return YAML text with a comment above each key that has one, by the key's dotted name."""
    for key, mark in reversed(list(_keys(yaml.compose(text, Loader=yaml.SafeLoader)))):
        margin = " " * mark.column
        lines = textwrap.wrap(
            comments.get(key, ""), WIDTH, initial_indent=f"{margin}# ", subsequent_indent=f"{margin}# "
        )
        start = mark.index - mark.column
        text = text[:start] + "".join(f"{line}\n" for line in lines) + text[start:]
    return text


def _keys(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, yaml.Mark]]:
    """Yield each key's dotted name and place, from top to bottom."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark
            yield from _keys(value, f"{prefix}{key.value}.")


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _weigh(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Return how many nodes there are once every anchor is unfolded, without unfolding one."""
    if depth > MAX_DEPTH:  # An anchor that holds itself ends here too.
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    if id(node) not in known:
        known[id(node)] = 1 + sum(_weigh(child, known, depth + 1) for child in _children(node))
    if known[id(node)] > MAX_NODES:
        raise ValueError(f"its anchors unfold to more than {MAX_NODES:,} values")
    return known[id(node)]


def _refuse_double_keys(node: yaml.Node, *, inside: bool) -> None:
    """Look at our section, and at its name; what other programs keep in the file is left to them."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            ours = isinstance(key, yaml.ScalarNode) and (inside or key.value == SECTION)
            line = key.start_mark.line + 1
            if ours and key.value in seen:
                first = seen[key.value]
                raise ValueError(f"the key {key.value} stands there twice, in lines {first} and {line}")
            if ours:
                seen[key.value] = line
                _refuse_double_keys(value, inside=True)
    elif inside:
        for child in _children(node):
            _refuse_double_keys(child, inside=True)
