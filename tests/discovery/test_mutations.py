"""Break one index map on purpose: the oracle must notice every time, and name a place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from composed import ComposedConfig, LinearAttention
from transformers import PreTrainedModel

from llmpruner import QUERY, Blocks, CoupledGroup, ModelFamily, Role, Span
from llmpruner.discovery.groups import discover_graph
from llmpruner.discovery.oracle import FAILED, VERIFIED, Oracle
from llmpruner.structure.coupling import CouplingGraph, Explicit

CONFIG = ComposedConfig(
    qkv="concatenated", mlp="packed", norm="offset", num_key_value_heads=3, qkv_bias=True, mlp_bias=True, out_bias=True
)


@pytest.fixture(scope="module")
def graph() -> CouplingGraph:
    found = discover_graph(CONFIG)
    # Query heads share spans with the groups that are broken here; without them every map stands alone.
    return replace(found, groups=tuple(g for g in found.groups if g.kind != QUERY))


def explicit(span: Span, order: Callable[[list[int]], list[int]]) -> Span:
    """The same indices, given to the units in another order."""
    units = span.index.units
    rows = tuple(tuple(span.index.of(u)) for u in order(list(range(units))))
    return replace(span, index=Explicit(rows))


def reverse(units: list[int]) -> list[int]:
    return units[::-1]


def rotate(units: list[int]) -> list[int]:
    return units[1:] + units[:1]


def of(name: str, axis: int = 0, number: int = 0) -> Callable[[CoupledGroup], int]:
    def find(group: CoupledGroup) -> int:
        return [n for n, s in enumerate(group.spans) if s.parameter.endswith(name) and s.axis == axis][number]

    return find


def change(find: Callable[[CoupledGroup], int], new: Callable[[Span], Span]) -> Callable[[CoupledGroup], CoupledGroup]:
    def mutate(group: CoupledGroup) -> CoupledGroup:
        position = find(group)
        spans = [new(s) if n == position else s for n, s in enumerate(group.spans)]
        return replace(group, spans=tuple(spans))

    return mutate


MUTATIONS: dict[str, tuple[str, Callable[[CoupledGroup], CoupledGroup]]] = {
    "mlp: up rows reversed": ("mlp", change(of("both.weight", number=1), lambda s: explicit(s, reverse))),
    "mlp: up bias shifted by one": ("mlp", change(of("both.bias", number=1), lambda s: explicit(s, rotate))),
    "mlp: gate and up neighbours": (
        "mlp",
        lambda g: change(of("both.weight"), lambda s: replace(s, index=Blocks(40, stride=2)))(
            change(of("both.weight", number=1), lambda s: replace(s, index=Blocks(40, start=1, stride=2)))(g)
        ),
    ),
    "mlp: down columns reversed": ("mlp", change(of("down.weight", 1), lambda s: explicit(s, reverse))),
    "mlp: down taken for a producer": ("mlp", change(of("down.weight", 1), lambda s: replace(s, role=Role.PRODUCES))),
    "attention: key rows shifted by a head": (
        "attention",
        change(of("qkv.weight", number=1), lambda s: explicit(s, rotate)),
    ),
    "attention: value bias reversed": ("attention", change(of("qkv.bias", number=2), lambda s: explicit(s, reverse))),
    "attention: query heads strided": (
        "attention",
        change(
            of("qkv.weight"),
            lambda s: replace(
                s,
                index=Explicit(
                    tuple((*range(u * 16, u * 16 + 16), *range(u * 16 + 48, u * 16 + 64)) for u in range(3))
                ),
            ),
        ),
    ),
    "attention: output columns shifted by a head": (
        "attention",
        change(of("out.weight", 1), lambda s: explicit(s, rotate)),
    ),
    "hidden: one norm is not rescaled": (
        "hidden",
        change(of("norm_2.weight"), lambda s: replace(s, role=Role.PRODUCES)),
    ),
    "hidden: the norm's offset is forgotten": ("hidden", change(of("norm_1.weight"), lambda s: replace(s, offset=0.0))),
    "hidden: an output projection reversed": ("hidden", change(of("down.weight"), lambda s: explicit(s, reverse))),
    "hidden: embedding columns shifted": ("hidden", change(of("embed.weight", 1), lambda s: explicit(s, rotate))),
    "vocabulary: rows of the embedding shifted": (
        "vocabulary",
        change(of("embed.weight"), lambda s: explicit(s, rotate)),
    ),
    "vocabulary: rows of the head reversed": ("vocabulary", change(of("head.weight"), lambda s: explicit(s, reverse))),
}


class ComposedFamily(ModelFamily):
    """Sets the head counts, so that a wrong map is not covered up by a search for attributes."""

    name = "composed"

    def refresh(self, model: PreTrainedModel) -> None:
        for layer in model.layers:
            attention, width = layer.attention, layer.attention.out.weight.shape[1]
            if isinstance(attention, LinearAttention):
                attention.keys, attention.values = width // 2, width
            else:
                attention.kv_heads, attention.heads = width // 32, width // 16


@pytest.fixture(scope="module")
def oracle(graph: CouplingGraph) -> Oracle:
    return Oracle(CONFIG, graph, ComposedFamily(), 0)


@pytest.mark.parametrize("name", MUTATIONS)
def test_oracle_catches(name: str, graph: CouplingGraph, oracle: Oracle) -> None:
    kind, mutate = MUTATIONS[name]
    victim = next(g for g in graph.groups if g.kind == kind)
    groups = tuple(mutate(g) if g is victim else g for g in graph.groups)
    assert groups != graph.groups
    oracle.graph = replace(graph, groups=groups)
    verdict = oracle.judge(kind)
    assert verdict.verdict == FAILED, verdict
    assert verdict.difference > 1e-3
    assert verdict.where or name.startswith("vocabulary: rows of the head")  # nothing comes after it


LINEAR: dict[str, Callable[[CoupledGroup], CoupledGroup]] = {
    "value rows shifted by a head": change(of("qkv.weight", number=2), lambda s: explicit(s, rotate)),
    "filters of the keys reversed": change(of("filter", number=1), lambda s: explicit(s, reverse)),
    "gates reversed": change(of("gate.weight"), lambda s: explicit(s, reverse)),
    "output columns shifted by a head": change(of("out.weight", 1), lambda s: explicit(s, rotate)),
}


@pytest.fixture(scope="module")
def hybrid() -> Oracle:
    config = ComposedConfig(linear=(1,))
    found = discover_graph(config)
    graph = replace(found, groups=tuple(g for g in found.groups if g.kind != QUERY))
    oracle = Oracle(config, graph, ComposedFamily(), 0)
    assert oracle.judge("attention").verdict == VERIFIED
    return oracle


@pytest.mark.parametrize("name", LINEAR)
def test_oracle_catches_in_a_layer_of_another_kind(name: str, hybrid: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = LINEAR[name](hybrid.graph.by_name["layers.1.attention"])
    groups = tuple(broken if g.name == broken.name else g for g in hybrid.graph.groups)
    assert groups != hybrid.graph.groups
    monkeypatch.setattr(hybrid, "graph", replace(hybrid.graph, groups=groups))
    verdict = hybrid.judge("attention")
    assert verdict.verdict == FAILED, verdict
    assert verdict.where.startswith("layers.1.attention")


def test_unbroken_map_passes(graph: CouplingGraph, oracle: Oracle) -> None:
    oracle.graph = graph
    assert [oracle.judge(kind).verdict for kind in ("mlp", "attention", "hidden", "vocabulary")] == [VERIFIED] * 4


def test_a_missing_span_is_refused(graph: CouplingGraph, oracle: Oracle) -> None:
    victim = graph.by_name["layers.0.mlp"]
    without = replace(victim, spans=tuple(s for s in victim.spans if not s.parameter.endswith("bias")))
    oracle.graph = replace(graph, groups=tuple(without if g is victim else g for g in graph.groups))
    verdict = oracle.judge("mlp")
    assert verdict.verdict != VERIFIED
    assert "size" in verdict.reason
