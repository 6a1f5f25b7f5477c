"""The section ``comparison``: several checkpoints by quality against size, with the best of each size marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..values import bytes_text, count_text
from .base import DENSE, Evidence, ReportSection, ReportSubject, rendered
from .chart import Chart, Point, Series, drawn
from .summary import Figures, figures

_DASHES = ("", "6 4", "2 3", "8 3 2 3")
_COLUMNS = ("Model", "Method", "Decoder removed", "Decoder parameters", "Weights", "Perplexity", "KL per token",
            "Accuracy", "Decoding speed-up", "Pareto")  # fmt: skip
_EMPTY = ("–", "")


@dataclass(frozen=True)
class Entry:
    """One checkpoint. ``method``: criterion and compensation. ``place``: parameters of the decoder, and perplexity;
    None where it was not measured. ``kl``: to the dense model, nats per token, if known."""

    name: str
    method: str
    figures: Figures
    place: tuple[float, float] | None
    kl: float | None

    def is_best(self, entries: Sequence[Entry]) -> bool:
        """Whether no other entry is both smaller and of lower perplexity (a Pareto point)."""
        if self.place is None:
            return False
        size, perplexity = self.place
        places = [other.place for other in entries if other.place not in (None, self.place)]
        return not any(place[0] <= size and place[1] <= perplexity for place in places if place)


class ComparisonSection(ReportSection):
    """A chart and a table on the page of several checkpoints."""

    name = "comparison"
    summary = "several checkpoints: quality against size, Pareto points, a table to sort"
    order = 1

    def render(self, subject: ReportSubject) -> None:
        del subject

    def compare(self, subjects: Sequence[ReportSubject]) -> str | None:
        entries = [_entry(subject.record, subject.evidence) for subject in subjects if subject.evidence is not None]
        best = [entry.name for entry in entries if entry.is_best(entries)]
        rows = [_row(entry, is_best=entry.name in best) for entry in entries]
        # The table is wide: without the columns that are known of no model.
        known = [place for place in range(len(_COLUMNS)) if any(row[place] != _EMPTY for row in rows)]
        chart = _chart(entries, best)
        return rendered(
            "comparison.html.j2", rows=[[row[place] for place in known] for row in rows],
            columns=[_COLUMNS[place] for place in known], chart=chart, picture=None if chart is None else drawn(chart),
            best=best,
        )  # fmt: skip


def _entry(record: Mapping[str, Any], evidence: Evidence) -> Entry:
    known = figures(evidence)
    place = None
    if known.parameters is not None and known.perplexity is not None:
        place = known.parameters.pruned, known.perplexity.pruned
    perplexities = ((measured.of(evidence.name).get("perplexity") or {}) for measured in evidence.measured)
    divergences = (one["kl_per_token"] for one in perplexities if one.get("kl_per_token") is not None)
    return Entry(evidence.name, method_of(record), known, place, next(divergences, None))


def method_of(record: Mapping[str, Any]) -> str:
    """``taylor``, ``output-energy + refit``, ``output-energy + refit, recovered``."""
    plans = record.get("plans") or ()
    if not plans:
        return ""
    plan = plans[-1]
    parts = [plan["estimation"]["criterion"], *([plan["compensation"]["name"]] if plan["compensation"] else [])]
    return " + ".join(parts) + (", recovered" if record.get("recovery") else "")


def _row(entry: Entry, *, is_best: bool) -> list[tuple[str, Any]]:
    """(text, value to sort by) of every column."""
    known = entry.figures

    def cell(value: float | None, text: str) -> tuple[str, Any]:
        return _EMPTY if value is None else (text.format(value), value)

    removed = None if known.parameters is None else 1 - known.parameters.ratio
    return [
        (entry.name, entry.name),
        (entry.method, entry.method),
        cell(removed, "{:.1%}"),
        _EMPTY if known.parameters is None else (count_text(known.parameters.pruned), known.parameters.pruned),
        _EMPTY if known.weights is None else (bytes_text(known.weights.pruned), known.weights.pruned),
        cell(None if known.perplexity is None else known.perplexity.pruned, "{:,.2f}"),
        cell(entry.kl, "{:.4f}"),
        cell(None if known.tasks is None else known.tasks.pruned, "{:.1%}"),
        cell(None if known.decode is None else known.decode.ratio, "{:.2f}"),
        ("yes" if is_best else "no", int(is_best)),
    ]


def _chart(entries: Sequence[Entry], best: Sequence[str]) -> Chart | None:
    """Perplexity against millions of decoder parameters, a line for each method, and the dense model."""
    placed = [(entry, *entry.place) for entry in entries if entry.place is not None]
    if not placed:
        return None
    lines: dict[str, list[Point]] = {}
    for entry, size, perplexity in placed:
        ring = entry.name in best
        note = f"{entry.name}: {count_text(size)} parameters in the decoder, perplexity {perplexity:.2f}"
        point = Point(size / 1e6, perplexity, note + (", Pareto" if ring else ""), entry.name, ring=ring)
        lines.setdefault(entry.method, []).append(point)
    series = [
        Series(method, tuple(sorted(points, key=lambda p: p.x)), accent=number == 0, dashes=_DASHES[number % 4])
        for number, (method, points) in enumerate(lines.items())
    ]
    first = placed[0][0].figures
    assert first.parameters is not None
    assert first.perplexity is not None
    note = f"dense: perplexity {first.perplexity.dense:.2f}"
    dense = Series("", (Point(first.parameters.dense / 1e6, first.perplexity.dense, note, DENSE),))
    text = f" on {first.text}" if first.text else ""
    perplexities = [perplexity for _, _, perplexity in placed]
    return Chart(
        "Perplexity against size: a point for each model, a line for each method", "million parameters in the decoder",
        f"perplexity{text}", (*series, dense), log=max(perplexities) > 5 * min(perplexities), width=820, height=400,
    )  # fmt: skip
