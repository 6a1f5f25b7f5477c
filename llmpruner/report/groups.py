"""The section ``groups``: the coupled groups of a model by kind."""

from __future__ import annotations

from typing import NamedTuple

from ..structure.coupling import HIDDEN, CouplingGraph
from .base import ReportSection, ReportSubject
from .templates import rendered


class KindRow(NamedTuple):
    """One kind of coupled group, as text. ``units``: per group; ``cost``: parameters per unit; both are ranges where
    groups differ. ``share``: of the decoder's parameters, that all units of the kind own together."""

    kind: str
    groups: str
    units: str
    cost: str
    share: str


KIND_COLUMNS = ("Kind", "Groups", "Units", "Parameters per unit", "Share of decoder")


def kind_rows(graph: CouplingGraph) -> list[KindRow]:
    """One row per kind, in the graph's order. Units of different kinds may own the same parameters, so shares may sum
    to more than 100 %."""
    rows = []
    for kind in graph.kinds:
        groups = graph.of_kinds([kind])
        owned = sum(group.units * graph.parameters_per_unit(group) for group in groups)
        # Hidden channels also own parameters outside of the decoder, and square matrices twice, by rows and columns.
        share = "all" if kind == HIDDEN else f"{owned / graph.decoder_parameters:.1%}"
        units, costs = {group.units for group in groups}, {graph.parameters_per_unit(group) for group in groups}
        rows.append(KindRow(kind, str(len(groups)), _range(units), _range(costs), share))
    return rows


def _range(values: set[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


class GroupsSection(ReportSection):
    """A table of `kind_rows`, on the page of a structure."""

    name = "groups"
    summary = "table of the coupled groups: kind, units, parameters per unit, share of the decoder"
    order = 10

    def render(self, subject: ReportSubject) -> str | None:
        if subject.evidence is not None:
            # The page of a checkpoint shows what was removed.
            return None
        return rendered("groups.html.j2", graph=subject.graph, columns=KIND_COLUMNS, rows=kind_rows(subject.graph))
