"""The picture of a block: which side of a rectangle an axis is, and where on it a unit lies."""

from __future__ import annotations

import re

from llmpruner import Blocks, CoupledGroup, CouplingGraph, Role, Span
from llmpruner.report.block import Band, _box, block_page

SHAPES = {"layers.0.gate_up": (4, 12, 8), "layers.0.down": (4, 8, 6), "layers.0.norm": (8,), "head": (16, 8)}
MLP = CoupledGroup(
    "layers.0.mlp", "mlp", 6,
    (
        Span("layers.0.gate_up", 1, Role.PRODUCES, Blocks(6)),
        Span("layers.0.gate_up", 1, Role.PRODUCES, Blocks(6, start=6)),
        Span("layers.0.down", 2, Role.CONSUMES, Blocks(6)),
    ),
    layer=0,
)  # fmt: skip
EXPERT = CoupledGroup("layers.0.expert", "expert", 4, (Span("layers.0.gate_up", 0, Role.PRODUCES, Blocks(4)),), layer=0)
HIDDEN = CoupledGroup("hidden", "hidden", 8, (Span("layers.0.norm", 0, Role.NORM, Blocks(8)),))
GRAPH = CouplingGraph((MLP, EXPERT, HIDDEN), SHAPES, "layers", ties={"head": "embedding"})


def sides(parameter):
    return {edge.kind: edge.side for edge in _box(GRAPH, list(GRAPH.groups), parameter, parameter).edges}


def test_of_a_stack_the_last_two_axes_are_rows_and_columns():
    assert sides("layers.0.gate_up") == {"mlp": "left", "expert": "bottom"}
    assert sides("layers.0.down") == {"mlp": "top"}
    assert sides("layers.0.norm") == {"hidden": "left"}


def test_two_spans_on_one_axis_share_an_edge_with_a_band_each():
    (edge, _) = _box(GRAPH, list(GRAPH.groups), "layers.0.gate_up", "").edges
    assert edge.bands == (Band(100 * 3 / 12, 100 / 12), Band(100 * 9 / 12, 100 / 12))


def test_the_page_needs_nothing_from_elsewhere_and_names_every_span():
    page = block_page("a <model>", GRAPH, 0)
    assert not re.search(r"https?://|<script|<link", page) and "a &lt;model&gt;" in page
    assert page.count("<tr><td") == 5 and "shared with embedding" in page
