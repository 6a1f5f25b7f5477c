"""One decoder block as a picture: every parameter a rectangle, every coupled axis an edge in its group's colour."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from math import log2

from ..coupling import CoupledGroup, CouplingGraph, Role

COLOURS = {
    "mlp": "#d1495b",
    "attention": "#00798c",
    "query": "#66a182",
    "hidden": "#8d6a9f",
    "expert": "#edae49",
    "latent": "#2e4057",
}
_OTHER = "#777777"
_STEP, _LEAST = 16, 18


@dataclass(frozen=True)
class Edge:
    """A coloured side of a rectangle. ``side``: left for axis 0, top for axis 1, and a band below for further axes."""

    side: str
    kind: str
    colour: str
    note: str


@dataclass(frozen=True)
class Box:
    """One parameter, its size in pixels a logarithm of its shape."""

    name: str
    shape: str
    width: int
    height: int
    edges: tuple[Edge, ...]


def block_page(title: str, graph: CouplingGraph, layer: int) -> str:
    """A complete HTML page for decoder layer ``layer``, with a legend that says what one unit of each group costs."""
    from jinja2 import Environment

    path = f"{graph.layers}.{layer}."
    groups = [g for g in graph.groups if g.spans and (g.layer is None or g.layer == layer)]
    names = [n for n in graph.shapes if n.startswith(path)]
    outside = [n for n in graph.shapes if not graph.is_decoder(n)]
    legend = [
        (COLOURS.get(g.kind, _OTHER), g.kind, f"{g.units:,} units of {graph.parameters_per_unit(g):,} parameters")
        for g in groups
    ]
    template = (resources.files("llmpruner.report") / "block.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=title,
        layer=layer,
        legend=legend,
        block=[_box(graph, groups, n, n[len(path) :]) for n in names],
        outside=[_box(graph, groups, n, n) for n in outside],
    )


def _box(graph: CouplingGraph, groups: list[CoupledGroup], parameter: str, label: str) -> Box:
    shape = graph.shapes[parameter]
    rows, columns = shape[-2:] if len(shape) > 1 else (shape[0], 1)
    edges = []
    for group in groups:
        for span in group.spans:
            if span.parameter == parameter:
                side = {0: "left", 1: "top"}.get(span.axis, "bottom")
                verb = {Role.PRODUCES: "produced", Role.CONSUMES: "consumed"}.get(span.role, "normalised")
                note = f"{group.kind}: {verb} along axis {span.axis}, {span.index}"
                edges.append(Edge(side, group.kind, COLOURS.get(group.kind, _OTHER), note))
    return Box(label, " × ".join(f"{n:,}" for n in shape), _pixels(columns), _pixels(rows), tuple(edges))


def _pixels(size: int) -> int:
    return _LEAST + round(_STEP * log2(max(size, 1)) / 1.6)
