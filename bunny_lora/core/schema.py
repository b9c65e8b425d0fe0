"""What a configuration's keys mean, for people who read it and for their editors."""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema


def is_section(field: FieldInfo) -> bool:
    """Whether a key holds further keys."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def fields(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Return every key by its dotted name, each section before its own keys."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = field
        if is_section(field):
            found |= fields(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
    return found


def comments(model: type[BaseModel], section: str) -> dict[str, str]:
    """Return what every key means and takes, for a file with the model's keys in `section`."""
    below = {f"{section}.{key}": _meaning(field) for key, field in fields(model).items()}
    return {section: inspect.getdoc(model) or ""} | below


def _meaning(field: FieldInfo) -> str:
    if is_section(field):
        return inspect.getdoc(field.annotation) or ""
    words = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    choices = f" One of {', '.join(words)}." if len(words) > 1 else ""
    return f"{field.description or ''}{choices}"


class _Untitled(GenerateJsonSchema):
    """Without a title for each key that only repeats its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _or_empty(section: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [section, {"type": "null"}]}


def of_file(model: type[BaseModel], section: str) -> dict[str, Any]:
    """Return the JSON Schema of a file with the model's keys in `section`.

    Other sections are other programs' own; an empty one, all commented out, means the defaults.
    """
    inner = model.model_json_schema(schema_generator=_Untitled)
    definitions = inner.pop("$defs", {})
    for name in filter(lambda name: is_section(model.model_fields[name]), inner["properties"]):
        inner["properties"][name] = _or_empty(inner["properties"][name])
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "type": "object",
        "required": [section],
        "properties": {section: _or_empty(inner)},
        "$defs": definitions,
    }
