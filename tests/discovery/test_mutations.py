"""Break one index map on purpose: the oracle must notice every time, and name a place."""

from dataclasses import replace

import pytest
from composed import ComposedConfig, LinearAttention

from llmpruner import QUERY, Blocks, ModelFamily, Role
from llmpruner.discovery.groups import discover_graph
from llmpruner.discovery.oracle import FAILED, VERIFIED, Oracle
from llmpruner.structure.coupling import Explicit

CONFIG = ComposedConfig(
    qkv="concatenated", mlp="packed", norm="offset", num_key_value_heads=3, qkv_bias=True, mlp_bias=True, out_bias=True
)


def graph_of(config):
    found = discover_graph(config)
    # Query heads share spans with the groups that are broken here; without them every map stands alone.
    return replace(found, groups=tuple(g for g in found.groups if g.kind != QUERY))


def reverse(units):
    return units[::-1]


def rotate(units):
    return units[1:] + units[:1]


def change(name, order=None, *, axis=0, number=0, **values):
    """With span ``number`` of a parameter changed: its indices in another ``order`` of the units, or ``values``."""

    def mutate(group):
        spans = list(group.spans)
        position = [n for n, s in enumerate(spans) if s.parameter.endswith(name) and s.axis == axis][number]
        index = spans[position].index
        new = values
        if order is not None:
            new = {"index": Explicit(tuple(tuple(index.of(u)) for u in order(list(range(index.units)))))}
        spans[position] = replace(spans[position], **new)
        return replace(group, spans=tuple(spans))

    return mutate


def neighbours(group):
    for number in range(2):
        group = change("both.weight", number=number, index=Blocks(40, start=number, stride=2))(group)
    return group


STRIDED = Explicit(tuple((*range(u * 16, u * 16 + 16), *range(u * 16 + 48, u * 16 + 64)) for u in range(3)))
MUTATIONS = {
    "mlp: up rows reversed": change("both.weight", reverse, number=1),
    "mlp: up bias shifted by one": change("both.bias", rotate, number=1),
    "mlp: gate and up neighbours": neighbours,
    "mlp: down columns reversed": change("down.weight", reverse, axis=1),
    "mlp: down taken for a producer": change("down.weight", axis=1, role=Role.PRODUCES),
    "attention: key rows shifted by a head": change("qkv.weight", rotate, number=1),
    "attention: value bias reversed": change("qkv.bias", reverse, number=2),
    "attention: query heads strided": change("qkv.weight", index=STRIDED),
    "attention: output columns shifted by a head": change("out.weight", rotate, axis=1),
    "hidden: one norm is not rescaled": change("norm_2.weight", role=Role.PRODUCES),
    "hidden: the norm's offset is forgotten": change("norm_1.weight", offset=0.0),
    "hidden: an output projection reversed": change("down.weight", reverse),
    "hidden: embedding columns shifted": change("embed.weight", rotate, axis=1),
    "vocabulary: rows of the embedding shifted": change("embed.weight", rotate),
    "vocabulary: rows of the head reversed": change("head.weight", reverse),
}


class ComposedFamily(ModelFamily):
    """Sets the head counts, so that a wrong map is not covered up by a search for attributes."""

    name = "composed"

    def refresh(self, model):
        for layer in model.layers:
            attention, width = layer.attention, layer.attention.out.weight.shape[1]
            if isinstance(attention, LinearAttention):
                attention.keys, attention.values = width // 2, width
            else:
                attention.kv_heads, attention.heads = width // 32, width // 16


@pytest.fixture(scope="module")
def oracle():
    return Oracle(CONFIG, graph_of(CONFIG), ComposedFamily(), 0)


@pytest.fixture(scope="module")
def hybrid():
    config = ComposedConfig(linear=(1,))
    oracle = Oracle(config, graph_of(config), ComposedFamily(), 0)
    assert oracle.judge("attention").verdict == VERIFIED
    return oracle


def broken(graph, name, mutate):
    victim = graph.by_name[name]
    new = mutate(victim)
    assert new != victim
    return replace(graph, groups=tuple(new if g is victim else g for g in graph.groups))


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_oracle_notices_a_broken_map(name, oracle, monkeypatch):
    kind = name.partition(":")[0]
    victim = kind if kind in ("hidden", "vocabulary") else f"layers.0.{kind}"
    monkeypatch.setattr(oracle, "graph", broken(oracle.graph, victim, MUTATIONS[name]))
    verdict = oracle.judge(kind)
    assert verdict.verdict == FAILED, verdict
    assert verdict.difference > 1e-3
    assert verdict.where or name.startswith("vocabulary: rows of the head")  # nothing comes after it


LINEAR = {
    "value rows shifted by a head": change("qkv.weight", rotate, number=2),
    "filters of the keys reversed": change("filter", reverse, number=1),
    "gates reversed": change("gate.weight", reverse),
    "output columns shifted by a head": change("out.weight", rotate, axis=1),
}


@pytest.mark.parametrize("name", LINEAR)
def test_the_oracle_notices_a_broken_map_in_a_layer_of_another_kind(name, hybrid, monkeypatch):
    monkeypatch.setattr(hybrid, "graph", broken(hybrid.graph, "layers.1.attention", LINEAR[name]))
    verdict = hybrid.judge("attention")
    assert verdict.verdict == FAILED, verdict
    assert verdict.where.startswith("layers.1.attention")


def test_the_unbroken_map_passes(oracle):
    assert [oracle.judge(kind).verdict for kind in ("mlp", "attention", "hidden", "vocabulary")] == [VERIFIED] * 4
