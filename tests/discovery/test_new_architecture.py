"""A model that discovery has never seen, and random ones of the same parts, with one or two kinds of layers."""

import random

import pytest
from composed import ComposedConfig

from llmpruner import Blocks
from llmpruner.discovery.groups import discover_graph
from llmpruner.discovery.oracle import VERIFIED
from llmpruner.discovery.verify import check_kinds
from llmpruner.models.family import AutoFamily

STRANGE = ComposedConfig(
    qkv="backwards", mlp="swapped", norm="offset", rotary=0.5, parallel=True, qkv_bias=True, mlp_bias=True
)


def test_a_strange_architecture_is_verified_without_code():
    graph = discover_graph(STRANGE)
    assert (graph.by_name["layers.1.attention"].units, graph.by_name["layers.1.mlp"].units) == (3, 40)
    verdicts, kinds = check_kinds(AutoFamily(), STRANGE), ("attention", "mlp", "hidden", "vocabulary", "layer")
    assert {v.kind: v.verdict for v in verdicts} == dict.fromkeys(kinds, VERIFIED), [
        (v.kind, v.where, v.reason) for v in verdicts
    ]


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
        expected = {"attention", "mlp", "layer"} | ({"hidden"} if config.norm != "layer" else set())
        assert expected <= found.keys(), (seed, found)
        wrong = [(v.kind, v.verdict, v.where, v.reason) for v in verdicts if v.verdict != VERIFIED]
        assert not wrong, (seed, wrong)
