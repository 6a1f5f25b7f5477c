"""Models that discovery has never seen, with one or two kinds of layers; index maps of one, broken on purpose, which
the oracle must notice; and what verdicts name: the parameter that is wrong, and every check that was not possible."""

import json
import random
from dataclasses import asdict, replace
from functools import cache

import pytest
from composed import ComposedConfig, LinearAttention
from transformers import LlamaConfig

from llmpruner import QUERY, Blocks, ModelFamily, Role
from llmpruner.discovery.groups import discover_graph
from llmpruner.discovery.oracle import FAILED, REFUSED, VERIFIED, Oracle
from llmpruner.discovery.verify import check_kinds
from llmpruner.models.family import AutoFamily
from llmpruner.structure.coupling import Explicit
from llmpruner.testing.family import differences


def test_every_kind_of_layer_has_heads_of_its_own():
    graph = discover_graph(ComposedConfig(num_hidden_layers=4, linear=(0, 2, 3)))
    linear, full = graph.by_name["layers.2.attention"], graph.by_name["layers.1.attention"]
    # A key head of 8 dimensions with its two value heads; a KV head of 16 with its two queries.
    assert (linear.units, full.units) == (4, 3)
    qkv = {s.index for s in linear.spans if s.parameter == "layers.2.attention.qkv.weight"}
    assert qkv == {Blocks(4, 8), Blocks(4, 8, start=32), Blocks(4, 16, start=64)}
    assert {s.parameter.rsplit(".", 2)[-2] for s in linear.spans} == {"qkv", "attention", "gate", "out"}
    values, queries = graph.by_name["layers.2.query"], graph.by_name["layers.1.query"]
    assert [(g.units, g.blocks) for g in (values, queries)] == [(8, 4), (6, 3)]


def random_config(seed):
    draw = random.Random(seed)
    return ComposedConfig(
        qkv=draw.choice(["separate", "concatenated", "interleaved", "backwards"]),
        mlp=draw.choice(["plain", "gated", "packed", "swapped", "woven"]),
        norm=draw.choice(["rms", "offset", "layer"]),
        rotary=draw.choice([0.0, 0.25, 0.5, 1.0]),
        num_key_value_heads=draw.choice([2, 3, 6]),
        **{
            flag: draw.random() < 0.5
            for flag in (
                "parallel", "qkv_bias", "out_bias", "mlp_bias", "head_norm", "transposed", "tie_word_embeddings",
            )
        },
        linear=draw.choice([(0,), (1,)]),
        linear_key_heads=draw.choice([2, 4]),
        linear_value_heads=draw.choice([4, 8]),
        linear_qkv=draw.choice(["separate", "concatenated"]),
        convolved=draw.random() < 0.5,
    )  # fmt: skip


COVERING = (
    2490, 2699, 4968, 9785, 10553, 11104, 16224, 17317, 17704, 17966, 20712, 27981, 29012, 32754, 39347, 39775, 43984,
    45018, 46476, 47628, 50515, 51323, 55641,
)  # fmt: skip
"""Seeds of architectures in which every two values of different options meet, as they do in all 200."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "seeds",
    [
        *(COVERING[start::4] for start in range(4)),
        *(pytest.param(range(first, first + 20), marks=pytest.mark.long) for first in range(0, 200, 20)),
    ],
    ids=lambda seeds: f"{seeds[0]} to {seeds[-1]}",
)
def test_random_architectures(seeds):
    for seed in seeds:
        config = random_config(seed)
        verdicts = check_kinds(AutoFamily(), config, seed=seed)
        found = {v.kind: v.verdict for v in verdicts}
        expected = {"attention", "mlp", "vocabulary", "layer"} | ({"hidden"} if config.norm != "layer" else set())
        assert expected <= found.keys(), (seed, found)
        wrong = [(v.kind, v.verdict, v.where, v.reason) for v in verdicts if v.verdict != VERIFIED]
        assert not wrong, (seed, wrong)


# Broken maps


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


# Verdicts


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
