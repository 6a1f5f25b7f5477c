"""The section ``plan``: the units that every layer kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .base import ReportSection, ReportSubject
from .templates import rendered

if TYPE_CHECKING:
    from ..structure.plan import GroupCut


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


@dataclass(frozen=True)
class MapRow:
    """One kind of unit in the map of a plan. ``cells``: for every layer from before the cut, the units, or None where
    none was removed."""

    kind: str
    cells: tuple[Cell | None, ...]


def cut_maps(tables: Sequence[CutTable], layers: int) -> list[list[MapRow]]:
    """For every table, a row for each kind. ``layers``: of the model after all cuts."""
    maps: list[list[MapRow]] = []
    for table in reversed(tables):
        layers += len(table.whole["layer"].gone) if "layer" in table.whole else 0
        of_layer = {n: row for row in table.rows for n in range(row.first, row.last + 1)}
        rows = [
            MapRow(kind, tuple(of_layer[n].cells[place] if n in of_layer else None for n in range(layers)))
            for place, kind in enumerate(table.kinds)
        ]
        if gone := table.whole.get("layer"):
            rows.append(MapRow("layer", tuple(Cell(0, 1) if n in gone.gone else None for n in range(layers))))
        maps.insert(0, rows)
    return maps


class PlanSection(ReportSection):
    """A map of layers and kinds and a table for each of `cut_tables`; nothing for a dense model."""

    name = "plan"
    summary = "what was cut: units kept of each kind in each layer"
    order = 20

    def render(self, subject: ReportSubject) -> str | None:
        tables = cut_tables(subject.record)
        maps = cut_maps(tables, subject.graph.num_layers)
        return rendered("plan.html.j2", tables=tables, maps=maps) if tables else None

    def style(self) -> str:
        return rendered("plan.css.j2")
