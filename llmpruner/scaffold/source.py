"""Python source, wrapped as a formatter would."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

ROOM = 100
"""Characters of a statement; the deepest one is indented by twelve more."""


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


def call(function: str, arguments: Sequence[str], room: int = ROOM) -> str:
    """A call on one line where it fits, else one argument a line."""
    line = f"{function}({', '.join(arguments)})"
    if len(line) <= room and "\n" not in line:
        return line
    return "\n".join([f"{function}(", *indented(f"{a}," for a in arguments), ")"])


def assign(target: str, value: str) -> str:
    """An assignment, its value in parentheses where it needs a line of its own."""
    line = f"{target} = {value}"
    return line if len(line) <= ROOM else "\n".join([f"{target} = (", *indented([value]), ")"])


def append(arguments: Sequence[str]) -> str:
    """A statement that appends a `CoupledGroup`."""
    line = f"groups.append(CoupledGroup({', '.join(arguments)}))"
    if len(line) <= ROOM:
        return line
    return "\n".join(["groups.append(", *indented([call("CoupledGroup", arguments)]), ")"])


def generator(item: str, clauses: Sequence[str], room: int = ROOM) -> str:
    """``*(item for …)``, one clause a line where it does not fit on one."""
    line = f"*({item} {' '.join(clauses)})"
    if len(line) <= room and "\n" not in line:
        return line
    return "\n".join(["*(", *indented([item, *clauses]), ")"])


def listed(items: Sequence[str], ends: str, room: int = ROOM) -> str:
    """A list or tuple display."""
    comma = "," if ends == "()" and len(items) == 1 else ""
    line = ends[0] + ", ".join(items) + comma + ends[1]
    if len(line) <= room and "\n" not in line:
        return line
    return "\n".join([ends[0], *indented(f"{item}," for item in items), ends[1]])


def uses(text: str, name: str) -> bool:
    """Whether ``text`` has the variable ``name``, and not merely an attribute of that name."""
    return re.search(rf"(?<![\w.]){name}\b", text) is not None


def indented(lines: Iterable[str], by: int = 4) -> list[str]:
    """``lines``, themselves of any number of lines, moved to the right."""
    return [" " * by + line if line else line for text in lines for line in text.split("\n")]
