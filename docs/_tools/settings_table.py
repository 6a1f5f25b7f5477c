"""Pydantic fields as rows of tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from docstrings import markdown
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

_TYPES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": "None", "object": "object"}
_BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
_UNBOUNDED = 100_000


def rows(model: type[BaseModel], *, links: bool = False) -> Iterator[tuple[str, str, str, str]]:
    """(name, type, default, description) of every field, as JSON has it. ``links``: types that are models of their own
    become links to headings of their name."""
    for name, field in model.model_fields.items():
        schema = TypeAdapter(field.rebuild_annotation()).json_schema(mode="serialization")
        inside = field.annotation
        if isinstance(inside, type) and issubclass(inside, BaseModel):
            schema = {"$ref": inside.__name__}
        kind = type_text(schema, schema.get("$defs", {}), links=links)
        bounds = ", ".join(_bounds(schema))
        yield name, kind + (f", {bounds}" if bounds else ""), default_text(field), field.description or ""


def table(model: type[BaseModel], first: str = "setting", *, links: bool = False) -> list[str]:
    """A Markdown table of the fields; without a column of descriptions where there are none."""
    found = list(rows(model, links=links))
    described = any(text for *_, text in found)
    lines = [f"| {first} | type | default |" + " what it is |" * described, "|---|---|---|" + "---|" * described]
    for name, kind, default, text in found:
        line = f"| `{name}` | {cell(kind)} | {cell(default)} |"
        lines.append(line + f" {cell(markdown(text))} |" * described)
    return lines


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def type_text(schema: dict[str, Any], definitions: dict[str, Any], *, links: bool = False) -> str:
    """What a JSON schema describes, in words: ``list of str``, ``int or None``, the values of a choice."""

    def inside(part: dict[str, Any]) -> str:
        return type_text(part, definitions, links=links)

    kind = schema.get("type", "")
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        text = f"[{name}](#{name.lower()})" if links else name
    elif "enum" in schema or "const" in schema:
        text = " or ".join(f"`{value!r}`" for value in schema.get("enum", [schema.get("const")]))
    elif "anyOf" in schema:
        text = " or ".join(dict.fromkeys(map(inside, schema["anyOf"])))
    elif "prefixItems" in schema:
        text = f"[{', '.join(map(inside, schema['prefixItems']))}]"
    elif kind == "array":
        text = f"list of {inside(schema.get('items') or {})}"
    elif kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        text = f"object of {inside(schema['additionalProperties'])}"
    else:
        text = _TYPES.get(kind, "any")
    return text


def default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "" if value is None else f"`{list(value) if isinstance(value, tuple) else value!r}`"


def _bounds(schema: dict[str, Any]) -> Iterator[str]:
    for part in (schema, *schema.get("anyOf", ())):
        yield from (text.format(part[k]) for k, text in _BOUNDS.items() if k in part and abs(part[k]) < _UNBOUNDED)
