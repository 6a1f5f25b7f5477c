"""Verdicts name the parameter that is wrong, and every check that was not possible. LLaMA's plugin
declares what discovery finds."""

from dataclasses import replace
from functools import cache

import pytest
from composed import ComposedConfig
from llmpruner_llama.family import LlamaFamily
from transformers import CodeGenConfig, LlamaConfig

from llmpruner import Blocks, ModelFamily, Role
from llmpruner.discovery.family import AutoFamily
from llmpruner.discovery.groups import discover_graph
from llmpruner.discovery.oracle import REFUSED, VERIFIED
from llmpruner.discovery.verify import check_kinds, verify
from llmpruner.structure.coupling import Explicit
from llmpruner.testing.family import differences

SIZES = {
    "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 64,
}  # fmt: skip
BIASED = ComposedConfig(mlp_bias=True, num_hidden_layers=3)
UP, BIAS, DOWN = (f"layers.0.mlp.{name}" for name in ("up.weight", "up.bias", "down.weight"))


@cache
def found():
    return discover_graph(BIASED).groups


def with_spans(group, change):
    return replace(group, spans=tuple(new for span in group.spans if (new := change(span)) is not None))


def test_the_small_model_has_heads():
    """CodeGen spreads its heads over four parts: with five heads, no head is in one part alone."""
    (verdict,) = verify(AutoFamily(), CodeGenConfig(), kinds=["attention"])
    assert verdict.verdict == VERIFIED


REVERSED = Explicit(tuple((39 - unit,) for unit in range(40)))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda s: None if s.parameter == DOWN else s,
            f"{DOWN} axis 1: nothing; discovery finds 0:40 (consumes)",
        ),
        (
            lambda s: replace(s, index=REVERSED) if s.parameter == UP else s,
            f"{UP} axis 0: explicit, 1 per unit (produces); discovery finds 0:40 (produces)",
        ),
        (
            lambda s: replace(s, role=Role.CONSUMES, offset=1.0) if s.parameter == UP else s,
            f"{UP} axis 0: 0:40 (consumes, offset 1); discovery finds 0:40 (produces)",
        ),
        (
            lambda s: replace(s, parameter=s.parameter.replace("down", "out")) if s.parameter == DOWN else s,
            "layers.0.mlp.out.weight axis 1: 0:40 (consumes); discovery finds nothing",
        ),
    ],
)
def test_every_sort_of_difference_is_named(change, line):
    (group,) = (g for g in found() if g.name == "layers.0.mlp")
    assert f"group layers.0.mlp: {line}" in differences([with_spans(group, change)], found())
    halves = [replace(s, index=Blocks(20, 2)) for s in group.spans]
    line = "group layers.0.mlp: 20 units in 1 blocks; discovery finds 40 units in 1 blocks"
    assert differences([replace(group, units=20, spans=tuple(halves))], found())[0] == line


def test_what_is_written_in_another_way_is_no_difference():
    explicit = [
        with_spans(g, lambda s: replace(s, index=Explicit(tuple(tuple(s.index.of(u)) for u in range(s.index.units)))))
        for g in found()
        if g.spans
    ]
    assert differences([replace(g, spans=g.spans[::-1]) for g in explicit], found()) == []


def test_checks_that_are_not_possible_are_listed():
    (verdict,) = check_kinds(AutoFamily(), BIASED, kinds=["mlp"])
    sdpa, generation = verdict.skipped
    assert sdpa.startswith("sdpa attention: a small composed cannot be built: ")
    assert generation.startswith("cached generation: the dense model gives other logits with a cache")
    assert "even sdpa" not in verdict.checks and "cached generation" not in verdict.checks


def test_a_model_with_everything_skips_nothing():
    (verdict,) = check_kinds(AutoFamily(), LlamaConfig(**SIZES), kinds=["mlp"])
    assert verdict.verdict == VERIFIED and verdict.skipped == []


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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 6},
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True, "head_dim": 10},
        {
            "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4,
            "head_dim": 4, "vocab_size": 16,
        },
    ],
    ids=["gqa", "mha", "biases", "tied", "equal sizes"],
)  # fmt: skip
def test_what_the_llama_plugin_declares_is_what_discovery_finds(changes):
    config = LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **changes})
    declared, found = LlamaFamily().coupled_groups(config), discover_graph(config)
    same = [[(g.name, g.kind, g.units, g.layer, g.blocks, g.minimum) for g in of] for of in (declared, found.groups)]
    assert sorted(same[0]) == sorted(same[1]) and differences(declared, found.groups) == []
    assert found.blocked == (), "everything is offered"
