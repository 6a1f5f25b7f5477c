"""Python source of plain values, as the formatter lays it out."""

from __future__ import annotations

import json
from typing import Any


def literal(value: Any, room: int = 80) -> str:
    """Python source of a JSON value, on one line where it fits into ``room`` characters."""
    if isinstance(value, dict):
        items, ends = [f"{literal(k)}: {literal(v, room - 4)}" for k, v in value.items()], "{}"
    elif isinstance(value, list | tuple):
        items, ends = [literal(v, room - 4) for v in value], "[]"
    else:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    line = ends[0] + ", ".join(items) + ends[1]
    if len(line) <= room:
        return line
    return "\n".join([ends[0], *(f"    {item},".replace("\n", "\n    ") for item in items), ends[1]])
