"""What is refused of values, in plain words: which one, and what was expected instead."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .errors import SettingsError

_EXPECTED = {
    "int_parsing": "expected a whole number",
    "int_parsing_size": "expected a smaller whole number",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "string_type": "expected text",
    "greater_than": "expected a number above {gt}",
    "greater_than_equal": "expected at least {ge}",
    "less_than": "expected a number below {lt}",
    "less_than_equal": "expected at most {le}",
}


def check_type(argument: str, value: object, types: type | tuple[type, ...], expected: str) -> None:
    """Raise `SettingsError` for an argument of a function that is of none of ``types``."""
    if not isinstance(value, types):
        raise SettingsError(f"{argument}: expected {expected}, got {type(value).__name__}")


def path_from(argument: str, value: object, expected: str = "a path") -> Path:
    """``value`` as a path. Raises as `check_type`."""
    check_type(argument, value, (str, PathLike), expected)
    return Path(value)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Refusal:
    """The first thing that is wrong. ``key``: the path of the field, with dots. ``kind``: pydantic's name of the
    error. ``value``: what was given, as text. ``expected``: half a sentence."""

    key: str
    kind: str
    value: str
    expected: str


def refusal(error: ValidationError) -> Refusal:
    """The first of the errors that pydantic found."""
    first = error.errors()[0]
    key, kind, value = ".".join(map(str, first["loc"])), str(first["type"]), first.get("input")
    context: dict[str, Any] = first.get("ctx", {})
    if kind == "literal_error":
        expected = _one_of(re.findall(r"'([^']*)'", context["expected"]), str(value))
    elif kind in _EXPECTED:
        expected = _EXPECTED[kind].format(**{name: _number(bound) for name, bound in context.items()})
    else:
        expected = str(first["msg"]).removeprefix("Value error, ")
    given = _short(", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))
    return Refusal(key, kind, f"'{given}'" if isinstance(value, (str, list, tuple)) else given, expected)


def _number(bound: Any) -> str:
    """A bound as people write it: ``1,048,576``, not ``1.04858e+06``."""
    if isinstance(bound, float) and bound.is_integer():
        bound = int(bound)
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}" if isinstance(bound, float) else str(bound)


def _short(text: str) -> str:
    """What was given, in one line of bearable length."""
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"


_LONGEST = 200


def _one_of(names: list[str], value: str) -> str:
    near = difflib.get_close_matches(value, names, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"expected one of {', '.join(names)}{hint}"
