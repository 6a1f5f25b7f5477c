"""The sections of what was done to the weights: ``plan``, the units that every layer kept, and ``compensation``, the
error of every fitted weight matrix."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .base import ReportSection, ReportSubject, rendered
from .chart import Chart, Point, Series, drawn

if TYPE_CHECKING:
    from ..structure.plan import GroupCut

_MOST = 4
"""Charts at most; the table has all matrices."""


@dataclass(frozen=True)
class Cell:
    """Units of one kind in one layer, or in the whole model. ``gone``: for layers, the removed ones."""

    kept: int
    units: int
    gone: tuple[int, ...] = ()

    @property
    def share(self) -> float:
        """Percentage of kept units."""
        return 100 * self.kept / self.units


@dataclass(frozen=True)
class LayerRow:
    """Consecutive layers with equal cuts. ``cells``: one per kind; None where no unit of the kind was removed."""

    first: int
    last: int
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class CutTable:
    """The cuts of one plan. ``whole``: kind → units, for groups across layers. Layer numbers are before the cut."""

    whole: Mapping[str, Cell]
    kinds: tuple[str, ...]
    rows: tuple[LayerRow, ...]


def cut_tables(record: Mapping[str, Any]) -> list[CutTable]:
    """One table per plan in ``record``, in the order in which they were applied. Raises `PlanError`."""
    from ..structure.plan import PruningPlan  # slow to import, and not needed for --help

    texts = [json.dumps(plan) for plan in record.get("plans") or ()]
    plans = [PruningPlan.parse(text, f"plan {number} of the record") for number, text in enumerate(texts, 1)]
    return [_table(plan.cuts) for plan in plans]


def _table(cuts: Mapping[str, GroupCut]) -> CutTable:
    whole: dict[str, Cell] = {}
    layers: dict[int, dict[str, Cell]] = {}
    for cut in cuts.values():
        place = whole if cut.layer is None else layers.setdefault(cut.layer, {})
        before = place.get(cut.kind, Cell(0, 0))
        gone = tuple(sorted(set(range(cut.units)) - set(cut.kept))) if cut.kind == "layer" else ()
        place[cut.kind] = Cell(before.kept + len(cut.kept), before.units + cut.units, gone)
    kinds = tuple(dict.fromkeys(cut.kind for cut in cuts.values() if cut.layer is not None))
    rows: list[LayerRow] = []
    for layer in sorted(layers):
        cells = tuple(layers[layer].get(kind) for kind in kinds)
        if rows and rows[-1].last == layer - 1 and rows[-1].cells == cells:
            rows[-1] = LayerRow(rows[-1].first, layer, cells)
        else:
            rows.append(LayerRow(layer, layer, cells))
    return CutTable(whole, kinds, tuple(rows))


class PlanSection(ReportSection):
    """A table for each of `cut_tables`; nothing for a dense model."""

    name = "plan"
    summary = "what was cut: units kept of each kind in each layer"
    order = 20

    def render(self, subject: ReportSubject) -> str | None:
        tables = cut_tables(subject.record)
        return rendered("plan.html.j2", tables=tables) if tables else None


class CompensationSection(ReportSection):
    """A chart for each kind of matrix, and a table; nothing where the record has no fits."""

    name = "compensation"
    summary = "the error of every fitted weight matrix before and after, and its ridge"
    order = 22

    def render(self, subject: ReportSubject) -> str | None:
        if subject.evidence is None:
            return None
        plans, work = (subject.record.get(part) or () for part in ("plans", "work"))
        fitted = [(plan, done["fits"]) for plan, done in zip(plans, work, strict=False) if done and done["fits"]]
        if not fitted:
            return None
        plan, fits = fitted[-1]
        rows = [_fit_row(subject.graph.layers, fit) for fit in fits]
        known = [row for row in rows if row["before"] is not None]
        kinds: dict[str, list[dict[str, Any]]] = {}
        for row in known:
            if row["layer"] is not None:
                kinds.setdefault(row["matrix"], []).append(row)
        charts = [_chart(matrix, of_matrix) for matrix, of_matrix in list(kinds.items())[:_MOST]]
        return rendered(
            "compensation.html.j2", rows=rows, charts=[(chart, drawn(chart)) for chart in charts],
            means=[fmean(row[key] for row in known) for key in ("before", "after")] if known else None,
            compensation=plan["compensation"], kept=sum(1 for row in rows if not row["fitted"]),
        )  # fmt: skip


def _fit_row(layers: str, fit: Mapping[str, Any]) -> dict[str, Any]:
    parts = re.match(rf"{re.escape(layers)}\.(\d+)\.(.+?)(\.weight)?$", fit["parameter"])
    layer, matrix = (int(parts[1]), parts[2]) if parts else (None, fit["parameter"])
    return {**fit, "layer": layer, "matrix": matrix}


def _chart(matrix: str, rows: Sequence[Mapping[str, Any]]) -> Chart:
    def points(key: str) -> tuple[Point, ...]:
        # On a logarithmic axis, an error of nothing is drawn as very little.
        return tuple(
            Point(row["layer"], max(row[key], 1e-6), f"layer {row['layer']}, {key}: {row[key]:.2%}") for row in rows
        )

    series = Series("before the fit", points("before")), Series("after", points("after"), accent=True)
    return Chart(
        f"Error of {matrix} by layer, before and after the fit", "layer", "error, share of the output", series,
        log=True, width=460, height=260,
    )  # fmt: skip
