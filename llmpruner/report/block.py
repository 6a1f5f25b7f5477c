"""The section ``block``: a drawing of one decoder layer, with a rectangle for every parameter and a coloured edge for
every coupled axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log2

from pydantic import Field

from ..component import ComponentSettings
from ..errors import SettingsError
from ..structure.coupling import CoupledGroup, CouplingGraph, Role, Span, runs
from .base import ReportSection, ReportSubject
from .templates import rendered

COLOURS = {
    "mlp": "#d1495b",
    "attention": "#00798c",
    "query": "#66a182",
    "hidden": "#8d6a9f",
    "expert": "#edae49",
    "latent": "#4f6d9a",
}
_OTHER = "#777777"
_STEP, _LEAST = 10, 18
"""Pixels per factor of two, and for an axis of size 1."""
_VERBS = {Role.PRODUCES: "produced", Role.CONSUMES: "consumed"}
_MOST_RUNS = 24
"""Maximum bands for a unit with several runs of indices."""


@dataclass(frozen=True)
class Band:
    """A run of one unit's indices, in percent of the axis."""

    start: float
    width: float


@dataclass(frozen=True)
class Edge:
    """A coloured side of a rectangle: left for rows, top for columns, bottom for the stacking axis of a 3-D parameter.
    ``bands``: the indices of one unit along it."""

    side: str
    kind: str
    colour: str
    note: str
    bands: tuple[Band, ...]


@dataclass(frozen=True)
class Box:
    """One parameter. Width and height, in pixels, are linear in the logarithm of columns and rows."""

    name: str
    shape: str
    width: int
    height: int
    edges: tuple[Edge, ...]


@dataclass(frozen=True)
class Row:
    """A span as a row of the table below the drawing."""

    kind: str
    colour: str
    parameter: str
    axis: int
    verb: str
    indices: str


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
        shown = {*names, *outside}
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
            rows=[_row(g, s) for g in groups for s in g.spans if s.parameter in shown],
        )

    def style(self) -> str:
        return rendered("block.css.j2")


def _colour(group: CoupledGroup) -> str:
    return COLOURS.get(group.kind, _OTHER)


def _box(graph: CouplingGraph, groups: list[CoupledGroup], parameter: str, label: str) -> Box:
    shape = graph.shapes[parameter]
    rows, columns = shape[-2:] if len(shape) > 1 else (*shape, 1)
    edges: dict[tuple[str, str], Edge] = {}
    for edge in (_edge(g, s, shape) for g in groups for s in g.spans if s.parameter == parameter):
        # Two spans of one group on one axis (packed gate and up) share an edge.
        same = edges.get((edge.side, edge.kind))
        edges[edge.side, edge.kind] = edge if same is None else _joined(same, edge)
    text = " × ".join(f"{n:,}" for n in shape)
    if parameter in graph.ties:
        text += f", shared with {graph.ties[parameter]}"
    return Box(label, text, _pixels(columns), _pixels(rows), tuple(edges.values()))


def _edge(group: CoupledGroup, span: Span, shape: Sequence[int]) -> Edge:
    # Of a stack of matrices, the last two axes are rows and columns.
    place = span.axis - max(len(shape) - 2, 0)
    side = ("left", "top")[place] if place >= 0 else "bottom"
    size = shape[span.axis]
    found = runs(sorted(span.index.of(group.units // 2)))[:_MOST_RUNS]
    bands = tuple(Band(100 * first / size, 100 * (last - first + 1) / size) for first, last in found)
    row = _row(group, span)
    return Edge(side, group.kind, row.colour, f"{row.kind}: {row.verb} along axis {row.axis}, {row.indices}", bands)


def _joined(one: Edge, other: Edge) -> Edge:
    return replace(one, bands=one.bands + other.bands, note=f"{one.note}; {other.note}")


def _row(group: CoupledGroup, span: Span) -> Row:
    verb = _VERBS.get(span.role, "normalised")
    return Row(group.kind, _colour(group), span.parameter, span.axis, verb, str(span.index))


def _pixels(size: int) -> int:
    return _LEAST + round(_STEP * log2(max(size, 1)))
