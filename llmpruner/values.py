"""Values as users write and read them: ``mlp,attention``, ``5.4B``, ``3-26``, ``4GiB``, ``taylor.variant=mix``; what is
refused of them, in plain words; and numbers in texts.

The types are for fields of settings: pydantic hands a value to the function in `BeforeValidator`, which returns values
of another type unchanged, so that pydantic refuses them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from .errors import SettingsError, near

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}
_LONGEST = 200
"""Characters of a value that are shown in a message."""


def names_of(value: Any) -> Any:
    """``"mlp, attention"`` as ``("mlp", "attention")``, without blanks and repetitions."""
    if not isinstance(value, str):
        return value
    return tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))


def _not_empty(value: Any) -> Any:
    names = names_of(value)
    if isinstance(names, tuple) and not names:
        raise ValueError("expected at least one name")
    return names


def _numbers(value: Any) -> Any:
    """``"1,4"`` as ``("1", "4")``, and a single number as a tuple."""
    numbers = (value,) if isinstance(value, (int, float)) else names_of(value)
    if not numbers:
        raise ValueError("expected at least one number")
    return numbers


def _count(value: Any) -> Any:
    """``5.4B``, ``120M``, ``98000000`` as a number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMB]?)\s*", value.upper()) if isinstance(value, str) else None
    if isinstance(value, str) and match is None:
        raise ValueError("expected a number of parameters: 5.4B, 120M or 98000000")
    return float(match[1]) * _UNITS[match[2]] if match else value


def _size(value: Any) -> Any:
    """``4GiB``, ``500MB`` or a number of bytes."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?\s*", value, re.I)
        if match is None or len(match[1]) > 30:
            raise ValueError("expected a size such as 4GiB, 500MB or a number of bytes")
        base = 1024 if match[3] else 1000
        return int(float(match[1]) * base ** (" KMGT".index(match[2].upper()) if match[2] else 0))
    return value


def _layers(value: Any) -> Any:
    """``3-26``, ``0,5,7-9`` or ``all``; numbers of layers become text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = ",".join(map(str, value))
    if isinstance(value, str) and value.strip() != "all":
        for part in value.split(","):
            match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
            if match is None or len(part) > 20 or int(match[2] or match[1]) < int(match[1]):
                raise ValueError("expected layer numbers such as 3-26 or 0,5,7-9, or all")
    return value


def layer_numbers(text: str | None, count: int) -> tuple[int, ...] | None:
    """The layer numbers that ``prune.layers`` selects in a model of ``count`` layers; None for None.

    Raises `SettingsError` for a layer that the model does not have.
    """
    if text is None:
        return None
    if text.strip() == "all":
        return tuple(range(count))
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) >= count:
            raise SettingsError(f"prune.layers {text}: the model has the layers 0-{count - 1}")
        numbers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(numbers))


def _component_settings(value: Any) -> Any:
    """``["taylor.variant=mix"]``, as the command line gives it, as ``{"taylor": {"variant": "mix"}}``."""
    if isinstance(value, Mapping):
        return value
    settings: dict[str, dict[str, Any]] = {}
    for text in value or ():
        match = re.fullmatch(r"([^.=\s]+)\.(\w+)=(.*)", str(text), re.S)
        if match is None:
            raise ValueError("expected NAME.key=value, such as taylor.variant=mix")
        settings.setdefault(match[1], {})[match[2]] = match[3]
    return settings


def _share_or_count(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("expected a share below 1, or a whole number of examples")
    return value


def _step_name(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", value):
        raise ValueError("expected a name of letters, digits, - and _, which begins with a letter or a digit")
    return value


def _written_out(value: Any) -> Any:
    """A path as text."""
    return str(value) if isinstance(value, Path) else value


Text = Annotated[str, BeforeValidator(_written_out)]
"""The name of a text or of data: a file, a data set, or a name that a calibration source reads."""
Names = Annotated[tuple[str, ...], BeforeValidator(_not_empty)]
Numbers = Annotated[tuple[Annotated[int, Field(ge=1, le=2**20)], ...], BeforeValidator(_numbers)]
Count = Annotated[float, BeforeValidator(_count)]
Size = Annotated[int, BeforeValidator(_size)]
"""A number of bytes."""
Layers = Annotated[str, BeforeValidator(_layers)]
"""Numbers of layers, which `layer_numbers` reads."""
ShareOrCount = Annotated[float, Field(ge=0), AfterValidator(_share_or_count)]
"""A share of the examples below 1, else a number of examples."""
StepName = Annotated[str, BeforeValidator(_step_name)]
ComponentValues = Annotated[dict[str, dict[str, Any]], BeforeValidator(_component_settings)]
"""Settings of components, by the component's name."""


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
    """The first thing that is wrong."""

    key: str
    """The path of the field, with dots."""
    kind: str
    """Pydantic's name of the error."""
    value: str
    """As text."""
    expected: str
    """Half a sentence."""


def refusal(error: ValidationError) -> Refusal:
    """The first of the errors that pydantic found."""
    first = error.errors()[0]
    key, kind, value = ".".join(map(str, first["loc"])), str(first["type"]), first.get("input")
    context: dict[str, Any] = first.get("ctx", {})
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", context["expected"])
        expected = f"expected one of {', '.join(names)}{near(str(value), names)}"
    elif kind in _EXPECTED:
        expected = _EXPECTED[kind].format(**{name: _number(bound) for name, bound in context.items()})
    else:
        expected = str(first["msg"]).removeprefix("Value error, ")
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    text = " ".join(text.split()) if "\n" in text else text
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}… ({len(text):,} characters)"
    return Refusal(key, kind, f"'{text}'" if isinstance(value, (str, list, tuple)) else text, expected)


def _number(bound: Any) -> str:
    """A bound as people write it: ``1,048,576``, not ``1.04858e+06``."""
    if isinstance(bound, float) and bound.is_integer():
        bound = int(bound)
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}" if isinstance(bound, float) else str(bound)


def count_text(value: float) -> str:
    """``106,202,880`` as ``106.20 M``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:,.0f}"


def bytes_text(value: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def counted(number: int | float, what: str) -> str:
    """``1 step``, ``2 steps``, ``1,200 steps``, ``0.5 steps``; ``what`` in the singular."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {what}" if number == 1 else f"{shown} {what}s"
