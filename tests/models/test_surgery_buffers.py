"""Buffers in groups: cut like parameters, and neither counted nor part of a model's structure."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from llmpruner import Blocks, CoupledGroup, Role, Span
from llmpruner.errors import CouplingError
from llmpruner.models.surgery import cut, silence
from llmpruner.structure.coupling import CouplingGraph
from llmpruner.structure.kept import restrict
from llmpruner.structure.plan import structure_of

BUFFER = Span("layers.0.table", 0, Role.PRODUCES, Blocks(3, width=2))
WEIGHT = Span("layers.0.weight", 1, Role.CONSUMES, Blocks(3, width=2))


def model() -> nn.Module:
    layer = nn.Linear(6, 4, bias=False)
    layer.register_buffer("table", torch.arange(6.0), persistent=False)
    return nn.ModuleDict({"layers": nn.ModuleList([layer])})


def graph(*buffers: Span, shape: tuple[int, ...] = (6,)) -> CouplingGraph:
    group = CoupledGroup("layers.0.mlp", "mlp", 3, (WEIGHT,), buffers=buffers)
    return CouplingGraph((group,), {"layers.0.weight": (4, 6)}, "layers", buffers={"layers.0.table": shape})


def test_the_entries_of_the_units_that_stay() -> None:
    tiny = model()
    remaining = cut(tiny, graph(BUFFER), {"layers.0.mlp": [0, 2]})
    layer = tiny["layers"][0]
    assert layer.table.tolist() == [0.0, 1.0, 4.0, 5.0]
    assert not isinstance(layer.table, nn.Parameter)
    assert layer.weight.shape == (4, 4)
    assert "layers.0.table" in tiny.state_dict(), "computed anew, it would have the entries of all units again"
    assert remaining == restrict(graph(BUFFER), {"layers.0.mlp": [0, 2]})
    assert remaining.buffers == {"layers.0.table": (4,)}
    assert remaining.groups[0].buffers == (replace(BUFFER, index=Blocks(2, width=2)),)
    cut(tiny, remaining, {"layers.0.mlp": [1]})
    assert layer.table.tolist() == [4.0, 5.0]


def test_an_untouched_buffer_stays_as_it_was() -> None:
    tiny = model()
    cut(tiny, graph(), {"layers.0.mlp": [0, 2]})
    assert tiny["layers"][0].table.tolist() == list(range(6))
    assert "layers.0.table" not in tiny.state_dict()


def test_units_under_a_norm_are_silenced_in_buffers_too() -> None:
    norm = Span("layers.0.weight", 1, Role.NORM, Blocks(3, width=2))
    group = CoupledGroup("layers.0.hidden", "hidden", 3, (norm,), buffers=(BUFFER,))
    tiny = model()
    silence(tiny, replace(graph(), groups=(group,)), {"layers.0.hidden": [0, 2]})
    assert tiny["layers"][0].table.tolist() == [0.0, 1.0, 0.0, 0.0, 4.0, 5.0]


def test_buffers_do_not_count() -> None:
    with_buffer, without = graph(BUFFER), replace(graph(), buffers={})
    assert structure_of(with_buffer) == structure_of(without)
    assert with_buffer.total_parameters == with_buffer.decoder_parameters == 24
    assert restrict(with_buffer, {"layers.0.mlp": [0]}).total_parameters == 8
    assert with_buffer.parameters_per_unit(with_buffer.groups[0]) == without.parameters_per_unit(without.groups[0])


@pytest.mark.parametrize(
    ("span", "message"),
    [
        (replace(BUFFER, parameter="layers.0.other"), "the model has no buffer 'layers.0.other'"),
        (replace(BUFFER, axis=1), "has no axis 1"),
        (replace(BUFFER, index=Blocks(3, width=2, start=1)), "outside the axis of size 6"),
        (replace(BUFFER, index=Blocks(2, width=2)), "maps 2 units, not 3"),
    ],
)
def test_a_wrong_span_is_refused(span: Span, message: str) -> None:
    with pytest.raises(CouplingError, match=message):
        graph(span)
