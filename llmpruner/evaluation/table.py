"""Several models side by side: one line per quantity, as text and as HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..amounts import bytes_text, count_text
from .base import Row
from .remarks import remarks
from .results import Evaluation


@dataclass(frozen=True, slots=True)
class Line:
    """One quantity for all models; None for models without it. ``higher_is_better``: None for neither. ``errors``:
    standard errors, None where not known. ``is_difference``: whether values are differences to the first model, which
    has None; their errors are paired, of the differences of single rows."""

    label: str
    values: tuple[float | None, ...]
    higher_is_better: bool | None
    errors: tuple[float | None, ...]
    is_difference: bool = False

    @property
    def cells(self) -> tuple[str, ...]:
        """The formatted values, ``-`` for None."""
        return tuple(self._cell(*pair) for pair in zip(self.values, self.errors, strict=True))

    def _cell(self, value: float | None, error: float | None) -> str:
        if value is None:
            return "-"
        if self.is_difference:
            return _signed(value) + _plus_minus(error)
        if self.label.endswith("bytes"):
            return bytes_text(value)
        if 1e5 <= value < math.inf:
            return count_text(value)
        if value >= 1e3 and float(value).is_integer():
            return f"{value:,.0f}"
        digits = 4 if value < 10 else 2
        return f"{value:.{digits}f}" + _plus_minus(error)


def _signed(value: float) -> str:
    text = f"{value:+.{4 if abs(value) < 10 else 2}f}"
    return text if float(text) else text[1:]


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"


class Evaluations(tuple[Evaluation, ...]):
    """The evaluations of one call, in the order of its models. A notebook shows them as a table."""

    __slots__ = ()

    @property
    def lines(self) -> list[Line]:
        """The table: a line for each quantity, with a value for each model."""
        return side_by_side(self)

    @property
    def remarks(self) -> list[str]:
        """Remarks on the results; see `llmpruner.evaluation.remarks`."""
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
    """The rows of ``evaluations`` by label, in the order of first occurrence, without labels that have no value. A row
    whose scores the first and another model have on the same data is followed by the differences to the first."""
    rows = [{row.label: row for row in evaluation.rows} for evaluation in evaluations]
    lines = []
    for label in dict.fromkeys(label for of_one in rows for label in of_one):
        found = [of_one.get(label) for of_one in rows]
        better = next(row.higher_is_better for row in found if row is not None)
        values = tuple(None if row is None else row.value for row in found)
        errors = tuple(None if row is None else row.error for row in found)
        if any(value is not None for value in values):
            lines.append(Line(label, values, better, errors))
        differences = [difference(found[0], row) for row in found]
        if any(one is not None for one in differences[1:]):
            means, paired = zip(*(one or (None, None) for one in [None, *differences[1:]]), strict=True)
            lines.append(Line(f"{label}, difference", means, better, paired, is_difference=True))
    return lines


def difference(first: Row | None, other: Row | None) -> tuple[float, float | None] | None:
    """Mean over the rows of the data of the score in ``other`` less that in ``first``, and its standard error: the
    sample standard deviation of these differences / √(number of rows), None for a single row. None where one of the two
    has no scores, or they are not of the same data."""
    if first is None or other is None or not first.scores or not other.scores:
        return None
    if len(first.scores) != len(other.scores) or first.scored != other.scored:
        return None
    of_rows = [after - before for before, after in zip(first.scores, other.scores, strict=True)]
    count = len(of_rows)
    mean = math.fsum(of_rows) / count
    if count == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((one - mean) ** 2 for one in of_rows) / (count - 1) / count)
