"""One decoder block as a picture: every parameter a rectangle, every coupled axis an edge in its group's colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from math import log2

from ..structure.coupling import CoupledGroup, CouplingGraph, Role, Span

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
_VERBS = {Role.PRODUCES: "produced", Role.CONSUMES: "consumed"}
_MOST_RUNS = 24


@dataclass(frozen=True)
class Band:
    """A run of one unit's indices, in per cent of the axis."""

    start: float
    width: float


@dataclass(frozen=True)
class Edge:
    """A coloured side of a rectangle: left for rows, top for columns, bottom for the stack that matrices lie in.
    ``bands``: where one unit lies along it."""

    side: str
    kind: str
    colour: str
    note: str
    bands: tuple[Band, ...]


@dataclass(frozen=True)
class Box:
    """One parameter, its size in pixels a logarithm of its shape."""

    name: str
    shape: str
    width: int
    height: int
    edges: tuple[Edge, ...]


@dataclass(frozen=True)
class Row:
    """A span in words, for those who cannot point at an edge."""

    kind: str
    colour: str
    parameter: str
    axis: int
    verb: str
    indices: str


def block_page(title: str, graph: CouplingGraph, layer: int) -> str:
    """A complete HTML page for decoder layer ``layer``, with a legend that says what one unit of each group costs."""
    from jinja2 import Environment

    path = f"{graph.layers}.{layer}."
    groups = [g for g in graph.groups if g.spans and (g.layer is None or g.layer == layer)]
    names = [n for n in graph.shapes if n.startswith(path)]
    outside = [n for n in graph.shapes if not graph.is_decoder(n)]
    shown = {*names, *outside}
    template = (resources.files("llmpruner.report") / "block.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=title,
        legend=[(_colour(g), g.kind, f"{g.units:,} units", f"{graph.parameters_per_unit(g):,}") for g in groups],
        parts=[
            (f"Decoder layer {layer} of {graph.num_layers}", [_box(graph, groups, n, n[len(path) :]) for n in names]),
            ("Outside the layers", [_box(graph, groups, n, n) for n in outside]),
        ],
        stacked=any(len(graph.shapes[n]) > 2 for n in names),
        rows=[_row(g, s) for g in groups for s in g.spans if s.parameter in shown],
    )


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
    runs = _runs(sorted(span.index.of(group.units // 2)))[:_MOST_RUNS]
    bands = tuple(Band(100 * first / size, 100 * (last - first + 1) / size) for first, last in runs)
    row = _row(group, span)
    return Edge(side, group.kind, row.colour, f"{row.kind}: {row.verb} along axis {row.axis}, {row.indices}", bands)


def _joined(one: Edge, other: Edge) -> Edge:
    return replace(one, bands=one.bands + other.bands, note=f"{one.note}; {other.note}")


def _row(group: CoupledGroup, span: Span) -> Row:
    verb = _VERBS.get(span.role, "normalised")
    return Row(group.kind, _colour(group), span.parameter, span.axis, verb, str(span.index))


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of every run of neighbours."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1] = runs[-1][0], index
        else:
            runs.append((index, index))
    return runs


def _pixels(size: int) -> int:
    return _LEAST + round(_STEP * log2(max(size, 1)))
