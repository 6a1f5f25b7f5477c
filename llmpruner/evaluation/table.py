"""Several models side by side: one line per quantity, as text and as HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..amounts import bytes_text, count_text
from .remarks import remarks
from .results import Evaluation


@dataclass(frozen=True, slots=True)
class Line:
    """One quantity for all models; None for models without it. ``higher_is_better``: None for neither. ``errors``:
    standard errors, None where not known."""

    label: str
    values: tuple[float | None, ...]
    higher_is_better: bool | None
    errors: tuple[float | None, ...]

    @property
    def cells(self) -> tuple[str, ...]:
        """The formatted values, ``-`` for None."""
        return tuple(self._cell(*pair) for pair in zip(self.values, self.errors, strict=True))

    def _cell(self, value: float | None, error: float | None) -> str:
        if value is None:
            return "-"
        if self.label.endswith("bytes"):
            return bytes_text(value)
        if 1e5 <= value < math.inf:
            return count_text(value)
        if value >= 1e3 and float(value).is_integer():
            return f"{value:,.0f}"
        digits = 4 if value < 10 else 2
        return f"{value:.{digits}f}" + (f" ± {error:.4f}" if error is not None else "")


class Evaluations(tuple[Evaluation, ...]):
    """The evaluations of one call, in the order of its models. A notebook shows them as a table."""

    __slots__ = ()

    @property
    def lines(self) -> list[Line]:
        return side_by_side(self)

    @property
    def remarks(self) -> list[str]:
        """What the table does not say; see `llmpruner.evaluation.remarks`."""
        return remarks(self)

    def as_json(self) -> list[dict[str, Any]]:
        """One object per model; see `Evaluation.as_json`."""
        return [evaluation.as_json() for evaluation in self]

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(evaluation.name)}</th>" for evaluation in self)
        body = "".join(
            f"<tr><th>{escape(line.label)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in line.cells)}</tr>"
            for line in self.lines
        )
        return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def side_by_side(evaluations: Sequence[Evaluation]) -> list[Line]:
    """The rows of ``evaluations`` by label, in the order of first occurrence, without labels that have no value."""
    rows = [{row.label: row for row in evaluation.rows} for evaluation in evaluations]
    lines = []
    for label in dict.fromkeys(label for of_one in rows for label in of_one):
        found = [of_one.get(label) for of_one in rows]
        better = next(row.higher_is_better for row in found if row is not None)
        values = tuple(None if row is None else row.value for row in found)
        errors = tuple(None if row is None else row.error for row in found)
        if any(value is not None for value in values):
            lines.append(Line(label, values, better, errors))
    return lines
