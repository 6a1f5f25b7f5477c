"""The sections of a model's structure: ``groups``, a table of its coupled groups, and ``block``, a drawing of one layer
with a rectangle for every parameter and a coloured edge for every coupled axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log2
from typing import NamedTuple

from pydantic import Field

from ..component import ComponentSettings
from ..errors import SettingsError
from ..structure.coupling import HIDDEN, CoupledGroup, CouplingGraph, Role, Span, runs
from .base import ReportSection, ReportSubject, rendered

COLOURS = {
    "mlp": "#d1495b",
    "attention": "#00798c",
    "query": "#66a182",
    "hidden": "#8d6a9f",
    "expert": "#edae49",
    "latent": "#4f6d9a",
}
_STEP, _LEAST = 10, 18
"""Pixels per factor of two, and for an axis of size 1."""
_MOST_RUNS = 24
"""Maximum bands for a unit with several runs of indices."""


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


@dataclass(frozen=True)
class Edge:
    """A coloured side of a rectangle: left for rows, top for columns, bottom for the stacking axis of a 3-D parameter.
    ``bands``: (start, width) of each run of one unit's indices along it, in percent."""

    side: str
    kind: str
    colour: str
    note: str
    bands: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Box:
    """One parameter. Width and height, in pixels, are linear in the logarithm of columns and rows."""

    name: str
    shape: str
    width: int
    height: int
    edges: tuple[Edge, ...]


class BlockSection(ReportSection):
    """On the page of a structure: a drawing, a legend with the parameters per unit of each group, a table of spans."""

    name = "block"
    summary = "drawing of one decoder layer: its parameters and their coupled axes"
    order = 30

    class Settings(ComponentSettings):
        layer: int | None = Field(None, ge=0, description="Decoder layer that is drawn; by default the middle one.")

    settings: Settings

    def render(self, subject: ReportSubject) -> str | None:
        if subject.evidence is not None:
            # It is of the structure, which the page of a checkpoint takes as known.
            return None
        graph, layer = subject.graph, self.settings.layer
        if layer is None:
            layer = graph.num_layers // 2
        if layer >= graph.num_layers:
            raise SettingsError(f"{self.label()}: layer {layer}: the model has the layers 0-{graph.num_layers - 1}")
        path = f"{graph.layers}.{layer}."
        groups = [g for g in graph.groups if g.spans and (g.layer is None or g.layer == layer)]
        names = [n for n in graph.shapes if n.startswith(path)]
        outside = [n for n in graph.shapes if not graph.is_decoder(n)]
        spans = [(g, span) for g in groups for span in g.spans if span.parameter in {*names, *outside}]
        return rendered(
            "block.html.j2",
            layer=layer,
            layers=graph.num_layers,
            legend=[(_colour(g), g.kind, f"{g.units:,} units", f"{graph.parameters_per_unit(g):,}") for g in groups],
            parts=[
                ("In the layer", [_box(graph, groups, n, n[len(path) :]) for n in names]),
                ("Outside the layers", [_box(graph, groups, n, n) for n in outside]),
            ],
            stacked=any(len(graph.shapes[n]) > 2 for n in names),
            rows=[(_colour(g), g.kind, span.parameter, span.axis, _verb(span), str(span.index)) for g, span in spans],
        )


def _colour(group: CoupledGroup) -> str:
    return COLOURS.get(group.kind, "#777777")


def _verb(span: Span) -> str:
    return {Role.PRODUCES: "produced", Role.CONSUMES: "consumed"}.get(span.role, "normalised")


def _box(graph: CouplingGraph, groups: list[CoupledGroup], parameter: str, label: str) -> Box:
    shape = graph.shapes[parameter]
    rows, columns = shape[-2:] if len(shape) > 1 else (*shape, 1)
    edges: dict[tuple[str, str], Edge] = {}
    for edge in (_edge(g, s, shape) for g in groups for s in g.spans if s.parameter == parameter):
        # Two spans of one group on one axis (packed gate and up) share an edge.
        if same := edges.get((edge.side, edge.kind)):
            both = replace(same, bands=same.bands + edge.bands, note=f"{same.note}; {edge.note}")
        edges[edge.side, edge.kind] = both if same else edge
    text = " × ".join(f"{n:,}" for n in shape)
    if parameter in graph.ties:
        text += f", shared with {graph.ties[parameter]}"
    width, height = (_LEAST + round(_STEP * log2(max(size, 1))) for size in (columns, rows))
    return Box(label, text, width, height, tuple(edges.values()))


def _edge(group: CoupledGroup, span: Span, shape: Sequence[int]) -> Edge:
    # Of a stack of matrices, the last two axes are rows and columns.
    place = span.axis - max(len(shape) - 2, 0)
    side = ("left", "top")[place] if place >= 0 else "bottom"
    size = shape[span.axis]
    of_unit = runs(sorted(span.index.of(group.units // 2)))[:_MOST_RUNS]
    bands = tuple((100 * first / size, 100 * (last - first + 1) / size) for first, last in of_unit)
    note = f"{group.kind}: {_verb(span)} along axis {span.axis}, {span.index}"
    return Edge(side, group.kind, _colour(group), note, bands)
