"""Verdicts name the parameter that is wrong, and every check that was not possible."""

import json
from dataclasses import asdict, replace
from functools import cache

import pytest
from composed import ComposedConfig
from transformers import LlamaConfig

from llmpruner import Blocks, ModelFamily, Role
from llmpruner.discovery.groups import discover_graph
from llmpruner.discovery.oracle import FAILED, REFUSED, VERIFIED
from llmpruner.discovery.verify import check_kinds
from llmpruner.models.family import AutoFamily
from llmpruner.structure.coupling import Explicit
from llmpruner.testing.family import differences

BIASED = ComposedConfig(mlp_bias=True, num_hidden_layers=3)
UP, DOWN = "layers.0.mlp.up.weight", "layers.0.mlp.down.weight"


@cache
def found():
    return discover_graph(BIASED).groups


OTHERWISE = {
    "other indices": (
        UP, {"index": Explicit(tuple((39 - unit,) for unit in range(40)))},
        f"{UP} axis 0: explicit, 1 per unit (produces); discovery finds 0:40 (produces)",
    ),
    "another role": (
        UP, {"role": Role.CONSUMES, "offset": 1.0},
        f"{UP} axis 0: 0:40 (consumes, offset 1); discovery finds 0:40 (produces)",
    ),
    "another parameter": (DOWN, {"parameter": "out"}, "out axis 1: 0:40 (consumes); discovery finds nothing"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERWISE)
def test_every_sort_of_difference_is_named(what):
    parameter, changes, line = OTHERWISE[what]
    (group,) = (g for g in found() if g.name == "layers.0.mlp")
    spans = tuple(replace(span, **changes) if span.parameter == parameter else span for span in group.spans)
    assert f"group layers.0.mlp: {line}" in differences([replace(group, spans=spans)], found())
    halves = [replace(s, index=Blocks(20, 2)) for s in group.spans]
    line = "group layers.0.mlp: 20 units in 1 blocks; discovery finds 40 units in 1 blocks"
    assert differences([replace(group, units=20, spans=tuple(halves))], found())[0] == line


def test_what_is_written_in_another_way_is_no_difference():
    def explicit(span):
        return replace(span, index=Explicit(tuple(tuple(span.index.of(unit)) for unit in range(span.index.units))))

    assert differences([replace(g, spans=tuple(map(explicit, g.spans[::-1]))) for g in found()], found()) == []


def test_checks_that_are_not_possible_are_listed():
    (verdict,) = check_kinds(AutoFamily(), BIASED, kinds=["mlp"])
    sdpa, generation = verdict.skipped
    assert sdpa.startswith("sdpa attention: a small composed cannot be built: ")
    assert generation.startswith("cached generation: the model gives other logits with a cache")
    assert "even sdpa" not in verdict.checks and "cached generation" not in verdict.checks


def test_a_group_that_cannot_be_cut_is_counted_and_named():
    """All units are one multiple, or every block has one unit: there is nothing to remove."""
    uncut = {"layers.0.mlp": {"multiple": 40}, "layers.1.mlp": {"blocks": 40}}
    groups = [replace(g, **uncut.get(g.name, {})) for g in found() if g.kind == "mlp"]
    family = type("Uncut", (ModelFamily,), {"coupled_groups": lambda _self, _config: groups})
    (verdict,) = check_kinds(family(), BIASED)
    assert (verdict.verdict, verdict.groups) == (VERIFIED, 3)
    assert "2 of 3 groups: no unit can be removed" in verdict.skipped
    groups = groups[:2]
    (verdict,) = check_kinds(family(), BIASED)
    assert (verdict.verdict, verdict.reason) == (REFUSED, "no unit can be removed from any group")
    assert verdict.checks == []


def test_a_verdict_on_logits_of_another_shape_is_json():
    """The embedding is cut, and the head is not."""
    (group,) = (g for g in found() if g.kind == "vocabulary")
    half = replace(group, spans=tuple(span for span in group.spans if span.parameter == "embed.weight"))
    family = type("Half", (ModelFamily,), {"coupled_groups": lambda _self, _config: [half]})
    (verdict,) = check_kinds(family(), BIASED)
    assert verdict.verdict == FAILED
    assert "Infinity" not in json.dumps(asdict(verdict))


def test_equal_sizes_are_told_apart():
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, vocab_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=4,
    )  # fmt: skip
    graph = discover_graph(config)
    kinds = {"attention": 4, "mlp": 16}
    units = {f"layers.{n}.{kind}": count for n in range(2) for kind, count in kinds.items()}
    assert {g.name: g.units for g in graph.groups} == units | {"hidden": 16, "vocabulary": 16, "layers": 2}
    assert graph.blocked == () and {v.verdict for v in check_kinds(AutoFamily(), config)} == {VERIFIED}
