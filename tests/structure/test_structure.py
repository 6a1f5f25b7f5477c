"""A coupling graph and what may be kept of it: names of groups, numbers of units, widths, and the order in which units
go."""

from dataclasses import replace

import pytest

from llmpruner import MLP, Blocks, CoupledGroup, Role, Span
from llmpruner.errors import CouplingError, PlanError
from llmpruner.structure.coupling import CouplingGraph
from llmpruner.structure.kept import check_kept, renamed, restrict
from llmpruner.structure.scope import Widths, build_queue, widths_for


def test_the_layer_of_a_group_is_checked():
    def graph(layer, *layers):
        spans = tuple(Span(f"layers.{n}.w", 0, Role.PRODUCES, Blocks(2)) for n in layers)
        shapes = {f"layers.{n}.w": (2,) for n in range(4)}
        return CouplingGraph((CoupledGroup("mlp", "mlp", 2, spans, layer=layer),), shapes, "layers")

    for layer in (2, None):
        with pytest.raises(CouplingError, match=f"is in layer 3: give it layer=3, not {layer}"):
            graph(layer, 3)
    with pytest.raises(CouplingError, match=r"'layers\.3\.mlp' is not in one layer alone: give it layer=None, not 3"):
        graph(3, 2, 3)
    assert (graph(3, 3).groups[0].name, graph(None, 2, 3).groups[0].name) == ("layers.3.mlp", "mlp")
    with pytest.raises(CouplingError, match="group 'layers' has 3 layers, and the decoder 4"):
        replace(graph(None, 2, 3), groups=(CoupledGroup("layers", "layer", 3),))


def test_names_follow_the_layers_that_stay():
    names = [f"layers.{n}.mlp" for n in range(12)]
    spans = [Span(f"{name}.w", 0, Role.PRODUCES, Blocks(8)) for name in names]
    groups = [CoupledGroup("mlp", MLP, 8, (span,), layer=n) for n, span in enumerate(spans)]
    graph = CouplingGraph(
        (*groups, CoupledGroup("layers", "layer", 12)), {f"{name}.w": (8,) for name in names}, "layers"
    )
    kept = {"layers": [0, 10, 11], "layers.10.mlp": range(4)}
    expected = {names[0]: names[0], names[10]: names[1], names[11]: names[2]}
    assert {old: new for old, new in renamed(graph, kept).items() if old in names} == expected
    left = restrict(graph, kept)
    assert {name: left.by_name[name].units for name in names[:3]} == {names[0]: 8, names[1]: 4, names[2]: 8}
    assert set(left.by_name) == {*names[:3], "layers"}


def test_a_number_of_units_that_is_no_multiple_is_refused():
    """Before the cut, not when the checkpoint is saved. All units may stay, whatever their number is."""
    group = CoupledGroup("mlp", MLP, 20, (Span("layers.0.w", 0, Role.PRODUCES, Blocks(20)),), multiple=8, layer=0)
    graph = CouplingGraph((group,), {"layers.0.w": (20,)}, "layers")
    for count in (8, 16, 20):
        check_kept(graph, {group.name: range(count)})
    with pytest.raises(PlanError, match=r"'layers.0.mlp' must keep a multiple of 8 units, the plan keeps 12"):
        check_kept(graph, {group.name: range(12)})


# Widths


def group(units: int, kind: str = "mlp", layer: int = 0, **more) -> CoupledGroup:
    return CoupledGroup(kind, kind, units, (Span("w", 0, Role.PRODUCES, Blocks(units)),), layer=layer, **more)


def test_a_multiple_and_a_minimum_of_the_group_itself_hold():
    one = group(30, multiple=8, minimum=9)
    queue = build_queue(one, [float(u) for u in range(30)], multiple=Widths().multiple(one))
    assert [30 - queue.removed_after(n) for n in range(len(queue.steps) + 1)] == [30, 24, 16]


def test_ties_are_broken_by_unit_number():
    assert build_queue(group(4), [1.0, 1.0, 0.0, 1.0]).steps == ((2,), (0,), (1,))


def test_groups_of_different_sizes_need_not_agree():
    groups = [group(64, layer=0), group(64, layer=1), group(32, layer=2), group(4, "attention", 0)]
    names = [g.name for g in groups]
    assert Widths(uniform=True, round_to=8).alike(groups) == [names[:2], names[2:3], names[3:]]
    assert Widths().alike(groups) == [[name] for name in names]
    # Nor those that have equal numbers left of different ones.
    left = widths_for("uniform", None, 1024, {names[1]: 512})
    assert [left.multiple(one) for one in groups[:2]] == [8, 64] and len(left.alike(groups[:2])) == 2


def test_widths_are_multiples_by_kind_and_hidden_size():
    alignments = [widths_for("uniform", None, size).round_to for size in (32, 64, 576, 896, 1024, 8192)]
    assert alignments == [2, 4, 32, 32, 64, 64]
    experts = [Widths(uniform=True).multiple(group(count, "expert")) for count in (2, 4, 8, 16, 60, 64, 256)]
    assert experts == [1, 1, 2, 4, 8, 8, 8]
    default = widths_for("uniform", None, 4096)
    assert [default.multiple(group(units)) for units in (11000, 512, 256, 6)] == [64, 64, 32, 1]
    # The k-quants of GGUF need rows of whole blocks of 256; where the dense model has none, nothing is kept.
    assert [default.multiple(group(units)) for units in (11008, 4864, 2560, 2304, 2592)] == [256, 256, 256, 64, 64]
    assert widths_for("uniform", 64, 4096).multiple(group(11008)) == 64
    assert default.multiple(group(51200, "vocabulary")) == 64
    assert default.multiple(group(8, "attention")) == default.multiple(group(32, "query")) == 1
    assert default.multiple(group(64, "expert")) == 8
    assert widths_for("uniform", 48, 4096).multiple(group(256)) == 48
    assert widths_for("free", None, 4096).multiple(group(256, multiple=4)) == 4
