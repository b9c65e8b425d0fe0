"""Read YAML that a person wrote, or that somebody sent: strict, small, and with every mistake named.

PyYAML alone keeps the last of two equal keys in silence, and unfolds a few lines of anchors into
gigabytes ("billion laughs").
"""

from __future__ import annotations

from typing import Any

import yaml

SECTION = "finetuning"
MAX_CHARACTERS = 10_000_000
MAX_DEPTH = 50
MAX_NODES = 100_000


def parse_yaml(text: str) -> Any:
    """Return what YAML text says.

    Raises:
        ValueError: it is no YAML, too large or nested too deeply, or has a key of ours twice.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it is longer than {MAX_CHARACTERS:,} characters")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _weigh(root, {}, 0)
            _refuse_double_keys(root, inside=False)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


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
