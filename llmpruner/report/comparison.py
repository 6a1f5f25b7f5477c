"""The section ``comparison``: several checkpoints by quality against size, those that none other beats marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..amounts import bytes_text, count_text
from .base import DENSE, Evidence, ReportSection, ReportSubject
from .chart import Chart, Point, Series, drawn
from .figures import Figures, figures
from .templates import rendered

_DASHES = ("", "6 4", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Entry:
    """One checkpoint. ``method``: criterion and compensation. ``kl``: to the dense model, nats per token; None where it
    was not measured. ``pareto``: whether no other one is both smaller and of lower perplexity."""

    name: str
    method: str
    figures: Figures
    kl: float | None
    pareto: bool = False


class ComparisonSection(ReportSection):
    """A chart and a table on the page of several checkpoints."""

    name = "comparison"
    summary = "several checkpoints: quality against size, Pareto points, a table to sort"
    order = 1

    def render(self, subject: ReportSubject) -> None:
        del subject

    def compare(self, subjects: Sequence[ReportSubject]) -> str | None:
        found = entries(subjects)
        chart = _chart(found, subjects)
        columns, rows = _table(found)
        return rendered(
            "comparison.html.j2", rows=rows, columns=columns, chart=chart,
            picture=None if chart is None else drawn(chart), best=_best(found),
        )  # fmt: skip

    def style(self) -> str:
        return rendered("comparison.css.j2")


def entries(subjects: Sequence[ReportSubject]) -> list[Entry]:
    """One for each subject with evidence, in their order."""
    found = [
        Entry(one.evidence.name, method_of(one.record), figures(one.evidence), _kl(one.evidence))
        for one in subjects
        if one.evidence is not None
    ]
    places = [_place(one.figures) for one in found]
    return [
        Entry(one.name, one.method, one.figures, one.kl, place is not None and not _beaten(place, places))
        for one, place in zip(found, places, strict=True)
    ]


def method_of(record: Mapping[str, Any]) -> str:
    """``taylor``, ``output-energy + refit``, ``output-energy + refit, recovered``."""
    plans = record.get("plans") or ()
    if not plans:
        return ""
    plan = plans[-1]
    parts = [plan["estimation"]["criterion"], *([plan["compensation"]["name"]] if plan["compensation"] else [])]
    return " + ".join(parts) + (", recovered" if record.get("recovery") else "")


def _place(found: Figures) -> tuple[float, float] | None:
    if found.parameters is None or found.perplexity is None:
        return None
    return found.parameters.pruned, found.perplexity.pruned


def _beaten(place: tuple[float, float], others: Sequence[tuple[float, float] | None]) -> bool:
    return any(
        other is not None and other != place and other[0] <= place[0] and other[1] <= place[1] for other in others
    )


def _kl(evidence: Evidence) -> float | None:
    for one in evidence.measured:
        value = (one.of(evidence.name).get("perplexity") or {}).get("kl_per_token")
        if value is not None:
            return float(value)
    return None


_COLUMNS = ("Model", "Method", "Decoder removed", "Decoder parameters", "Weights", "Perplexity", "KL per token",
            "Accuracy", "Decoding speed-up", "Pareto")  # fmt: skip
_EMPTY = ("–", "")


def _table(found: Sequence[Entry]) -> tuple[list[str], list[list[tuple[str, Any]]]]:
    """Columns and rows, without the columns that are known of no model: the table is wide."""
    rows = [_row(one) for one in found]
    known = [place for place in range(len(_COLUMNS)) if any(row[place] != _EMPTY for row in rows)]
    return [_COLUMNS[place] for place in known], [[row[place] for place in known] for row in rows]


def _row(one: Entry) -> list[tuple[str, Any]]:
    """(text, value to sort by) of every column."""
    of = one.figures

    def cell(value: float | None, text: str) -> tuple[str, Any]:
        return _EMPTY if value is None else (text.format(value), value)

    removed = None if of.parameters is None else 1 - of.parameters.ratio
    return [
        (one.name, one.name),
        (one.method, one.method),
        cell(removed, "{:.1%}"),
        _EMPTY if of.parameters is None else (count_text(of.parameters.pruned), of.parameters.pruned),
        _EMPTY if of.weights is None else (bytes_text(of.weights.pruned), of.weights.pruned),
        cell(None if of.perplexity is None else of.perplexity.pruned, "{:,.2f}"),
        cell(one.kl, "{:.4f}"),
        cell(None if of.tasks is None else of.tasks.pruned, "{:.1%}"),
        cell(None if of.decode is None else of.decode.ratio, "{:.2f}"),
        ("yes" if one.pareto else "no", int(one.pareto)),
    ]


def _chart(found: Sequence[Entry], subjects: Sequence[ReportSubject]) -> Chart | None:
    """Perplexity against millions of decoder parameters, a line for each method, and the dense model."""
    lines: dict[str, list[Point]] = {}
    for one in found:
        place = _place(one.figures)
        if place is not None:
            note = f"{one.name}: {count_text(place[0])} parameters in the decoder, perplexity {place[1]:.2f}"
            note += ", Pareto" if one.pareto else ""
            lines.setdefault(one.method, []).append(Point(place[0] / 1e6, place[1], note, one.name, ring=one.pareto))
    if not lines:
        return None
    series = [
        Series(method, tuple(sorted(points, key=lambda p: p.x)), accent=number == 0, dashes=_DASHES[number % 4])
        for number, (method, points) in enumerate(lines.items())
    ]
    first = next(one.figures for one in found if _place(one.figures) is not None)
    assert first.parameters is not None
    assert first.perplexity is not None
    note = f"dense: perplexity {first.perplexity.dense:.2f}"
    whole = Point(first.parameters.dense / 1e6, first.perplexity.dense, note, DENSE)
    text = f" on {first.text}" if first.text else ""
    return Chart(
        "Perplexity against size: a point for each model, a line for each method", "million parameters in the decoder",
        f"perplexity{text}", (*series, Series("", (whole,))), log=_wide(found), width=820, height=400,
    )  # fmt: skip


def _wide(found: Sequence[Entry]) -> bool:
    values = [place[1] for one in found if (place := _place(one.figures)) is not None]
    return max(values) > 5 * min(values)


def _best(found: Sequence[Entry]) -> list[str]:
    return [one.name for one in found if one.pareto]
