"""Values as users write and read them, messages about those that pydantic refuses, and numbers in texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from .errors import SettingsError, near

M = TypeVar("M", bound=BaseModel)


def names_of(value: Any) -> Any:
    """``"mlp, attention"`` as ``("mlp", "attention")``, without blanks and repetitions; a number as a tuple."""
    if isinstance(value, (int, float)):
        return (value,)
    if not isinstance(value, str):
        return value
    return tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))


def _count(value: Any) -> Any:
    """``5.4B``, ``120M``, ``98000000`` as a number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMB]?)\s*", value.upper()) if isinstance(value, str) else None
    count = float(match[1]) * {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}[match[2]] if match else value
    if isinstance(value, str) and (match is None or count < 1):
        raise ValueError("expected a number of parameters: 5.4B, 120M or 98000000 (--ratio takes the share to remove)")
    return count


def _layers(value: Any) -> Any:
    """``3-26``, ``0,5,7-9`` or ``all``; numbers of layers become text."""
    if isinstance(value, int):
        value = str(value)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        value = ",".join(map(str, value))
    if isinstance(value, str) and value.strip() != "all":
        for part in value.split(","):
            match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
            if match is None or int(match[2] or match[1]) < int(match[1]):
                raise ValueError("expected layer numbers such as 3-26 or 0,5,7-9, or all")
    return value


def chosen_layers(text: str | None, count: int) -> tuple[int, ...] | None:
    """The layer numbers that ``prune.layers`` selects in a model of ``count`` layers; None for None."""
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


Text = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
"""The name of a text or of data: a file, a data set, or a name that a calibration source reads."""
Names = Annotated[tuple[str, ...], BeforeValidator(names_of), Field(min_length=1)]
Numbers = Annotated[tuple[Annotated[int, Field(ge=1, le=2**20)], ...], BeforeValidator(names_of), Field(min_length=1)]
Count = Annotated[float, BeforeValidator(_count)]
Layers = Annotated[str, BeforeValidator(_layers)]
"""Numbers of layers, which `chosen_layers` reads."""
ComponentValues = Annotated[dict[str, dict[str, Any]], BeforeValidator(_component_settings)]
"""Settings of components, by the component's name."""


def validated(model: type[M], values: Mapping[str, Any], place: str = "", label: Callable[[str], str] = str) -> M:
    """An instance of ``model``. The line of a `SettingsError` begins with ``place``, and names a field by ``label``."""
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields) or "none"
            reason = f"unknown setting '{key}'{near(key, model.model_fields) or '.'} Known: {known}"
        elif first["type"] == "missing":
            reason = f"{label(key)} must be given"
        else:
            reason = refusal(error, label)
        # In a notebook, pydantic's traceback would hide the line.
        raise SettingsError(f"{place}: {reason}" if place else reason) from None


def refusal(error: ValidationError, label: Callable[[str], str] = str) -> str:
    """The first error that pydantic reports, in one line: ``--ratio '0': input should be greater than 0``."""
    first = error.errors()[0]
    value = repr(first["input"])
    value = value if len(value) <= 200 else f"{value[:200]}…"
    key = ".".join(map(str, (label(str(first["loc"][0])), *first["loc"][1:]))) if first["loc"] else "value"
    message = first["msg"].removeprefix("Value error, ")
    hint = ""
    if first["type"] == "less_than" and first["ctx"]["lt"] == 1 < float(first["input"]) < 100:
        hint = f"; {float(first['input']) / 100:g} for {first['input']} %?"
    if first["type"] == "float_parsing":
        if percent := re.fullmatch(r"(\d+(?:\.\d+)?) *%", first["input"]):
            hint = f"; {float(percent[1]) / 100:g} for {first['input']}?"
        elif re.fullmatch(r"\d+,\d+", first["input"]):
            hint = f"; {first['input'].replace(',', '.')} with a point?"
    return f"{key} {value}: {message[0].lower()}{message[1:]}{hint}"


def count_text(value: float) -> str:
    """``106,202,880`` as ``106.20 M``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.4g}"


def bytes_text(value: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def counted(number: int | float, what: str) -> str:
    """``1 step``, ``2 steps``, ``1,200 steps``, ``0.5 steps``; ``what`` in the singular."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {what}" if number == 1 else f"{shown} {what}s"


def html_table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table for notebooks. ``rows``, ``head``: texts of cells; the first cell of a row is its title."""
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"] if head else []
    for title, *cells in rows:
        lines.append(f"<tr><th>{escape(title)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


_FOLDERS = re.compile(r"(^|,|\*|[\w-]{2,}:)(?:/(?!/)|[A-Za-z]:[\\/])(?:[^,]*[/\\])?(?=[^,/\\])")
"""The folders of an absolute path: at the start, after a comma, a share (``3*``) or the name of a source."""


def without_folders(text: str) -> str:
    """``text`` without the folders of absolute paths: ``3*self,1*chat:b.jsonl`` for ``3*self,1*chat:/a/b.jsonl``."""
    return _FOLDERS.sub(r"\1", text)
