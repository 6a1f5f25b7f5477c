"""Pydantic fields as rows of tables, in the words of ``llmpruner plugins NAME``."""

from __future__ import annotations

import re
from typing import Any

from docstrings import markdown
from pydantic import BaseModel, PlainSerializer
from pydantic.fields import FieldInfo

from llmpruner.cli.derive import bounds_of, type_text


def table(model: type[BaseModel], first: str = "setting", *, links: bool = False) -> list[str]:
    """A Markdown table of the fields; without a column of descriptions where there are none. ``links``: as JSON has
    them; types that are models of their own become links to headings of their name."""
    fields = model.model_fields
    described = any(field.description for field in fields.values())
    lines = [f"| {first} | type | default |" + " what it is |" * described, "|---|---|---|" + "---|" * described]
    for name, field in fields.items():
        kind = ", ".join([type_text(_written(field)), *bounds_of(field)])
        if links:
            kind = re.sub(r"\b[A-Z]\w+", lambda found: f"[{found[0]}](#{found[0].lower()})", kind)
            kind = kind.replace("dict", "object")
        line = f"| `{name}` | {cell(kind)} | {cell(_default(field))} |"
        lines.append(line + f" {cell(markdown(field.description or ''))} |" * described)
    return lines


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _written(field: FieldInfo) -> Any:
    """The type of a field in JSON."""
    return next((mark.return_type for mark in field.metadata if isinstance(mark, PlainSerializer)), field.annotation)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "" if value is None else f"`{list(value) if isinstance(value, tuple) else value!r}`"
