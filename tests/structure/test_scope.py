"""Which widths a group may keep, which groups keep the same, and in which order units go."""

from llmpruner import Blocks, CoupledGroup, Role, Span
from llmpruner.structure.scope import Widths, build_queue, widths_for


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
    assert [default.multiple(group(units)) for units in (11008, 512, 256, 6)] == [64, 64, 32, 1]
    assert default.multiple(group(8, "attention")) == default.multiple(group(32, "query")) == 1
    assert default.multiple(group(64, "expert")) == 8
    assert widths_for("uniform", 48, 4096).multiple(group(256)) == 48
    assert widths_for("free", None, 4096).multiple(group(256, multiple=4)) == 4
