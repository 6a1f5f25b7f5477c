"""The section ``compensation``: how well the weights that read removed units could be fitted again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .base import ReportSection, ReportSubject
from .chart import Chart, Point, Series, drawn
from .templates import rendered

_MOST = 4
"""Charts at most; the table has all matrices."""


class CompensationSection(ReportSection):
    """A chart for each kind of matrix, and a table; nothing where the record has no fits."""

    name = "compensation"
    summary = "the error of every fitted weight matrix before and after, and its ridge"
    order = 22

    def render(self, subject: ReportSubject) -> str | None:
        if subject.evidence is None:
            return None
        plans, work = (subject.record.get(part) or () for part in ("plans", "work"))
        fitted = [(plan, one) for plan, one in zip(plans, work, strict=False) if one and one["fits"]]
        if not fitted:
            return None
        plan, last = fitted[-1]
        rows = [_row(subject.graph.layers, fit) for fit in last["fits"]]
        kinds: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["layer"] is not None and row["before"] is not None:
                kinds.setdefault(row["matrix"], []).append(row)
        charts = [_chart(matrix, of_one) for matrix, of_one in list(kinds.items())[:_MOST]]
        known = [row for row in rows if row["before"] is not None]
        return rendered(
            "compensation.html.j2", rows=rows, charts=[(one, drawn(one)) for one in charts], means=_means(known),
            compensation=plan["compensation"], kept=sum(1 for row in rows if not row["fitted"]),
        )  # fmt: skip


def _row(layers: str, fit: Mapping[str, Any]) -> dict[str, Any]:
    found = re.match(rf"{re.escape(layers)}\.(\d+)\.(.+?)(\.weight)?$", fit["parameter"])
    layer, matrix = (int(found[1]), found[2]) if found else (None, fit["parameter"])
    return {**fit, "layer": layer, "matrix": matrix}


def _means(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Mean errors before and after, over matrices."""
    if not rows:
        return None
    return sum(row["before"] for row in rows) / len(rows), sum(row["after"] for row in rows) / len(rows)


def _chart(matrix: str, rows: Sequence[Mapping[str, Any]]) -> Chart:
    def points(key: str, what: str) -> tuple[Point, ...]:
        # On a logarithmic axis, an error of nothing is drawn as very little.
        return tuple(
            Point(row["layer"], max(row[key], 1e-6), f"layer {row['layer']}, {what}: {row[key]:.2%}") for row in rows
        )

    series = (
        Series("before the fit", points("before", "before")),
        Series("after", points("after", "after"), accent=True),
    )
    return Chart(
        f"Error of {matrix} by layer, before and after the fit", "layer", "error, share of the output", series,
        log=True, width=460, height=260,
    )  # fmt: skip
