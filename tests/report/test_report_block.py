"""The picture of a block: which side of a rectangle an axis is, and where on it a unit lies."""

from __future__ import annotations

import pytest

from llmpruner import Blocks, CoupledGroup, Role, Span
from llmpruner.errors import SettingsError
from llmpruner.report.base import ReportSubject
from llmpruner.report.structure import BlockSection, _box
from llmpruner.structure.coupling import CouplingGraph

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
    assert edge.bands == ((100 * 3 / 12, 100 / 12), (100 * 9 / 12, 100 / 12))


def test_the_drawing_names_every_span_and_what_is_tied():
    drawn = BlockSection().render(ReportSubject("title", GRAPH))
    assert drawn.startswith("<h2>Coupled axes of decoder layer 0 of 1</h2>")
    assert drawn.count("<tr><td") == 5 and "shared with embedding" in drawn
    assert drawn.count('class="box"') == len(SHAPES) and "bottom edges the stack of" in drawn


def test_the_layer_is_the_middle_one_unless_it_is_chosen():
    shapes = {f"layers.{n}.up": (6, 8) for n in range(3)}
    spans = [Span(f"layers.{n}.up", 0, Role.PRODUCES, Blocks(6)) for n in range(3)]
    groups = tuple(CoupledGroup(f"layers.{n}.mlp", "mlp", 6, (spans[n],), layer=n) for n in range(3))
    subject = ReportSubject("title", CouplingGraph(groups, shapes, "layers"))
    assert "layers.1.up" in BlockSection().render(subject)
    chosen = BlockSection(layer=0).render(subject)
    assert "layers.0.up" in chosen and "layers.1.up" not in chosen
    with pytest.raises(SettingsError, match="layer 3: the model has the layers 0-2"):
        BlockSection(layer=3).render(subject)


def test_names_from_the_model_are_escaped():
    shapes = {"layers.0.<b>": (6, 8)}
    group = CoupledGroup("layers.0.mlp", "<i>", 6, (Span("layers.0.<b>", 0, Role.PRODUCES, Blocks(6)),), layer=0)
    drawn = BlockSection().render(ReportSubject("title", CouplingGraph((group,), shapes, "layers")))
    assert "<b>&lt;i&gt;</b>" in drawn and "layers.0.&lt;b&gt;" in drawn and "<i>" not in drawn
