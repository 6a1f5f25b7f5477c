"""Latency: a table of measured times, and a cost that follows from it."""

from __future__ import annotations

import copy
import timeit
from dataclasses import replace
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

import llmpruner
from llmpruner import ModelError, PruningPlan, UnsupportedModelError
from llmpruner.discovery.graph import build_graph
from llmpruner.discovery.tiny import random_instance
from llmpruner.errors import PlanError, SelectionError
from llmpruner.models.generation import CachedModel, sample_tokens
from llmpruner.models.model import Model
from llmpruner.models.surgery import cut
from llmpruner.pruning.budgets.base import BudgetSubject
from llmpruner.pruning.budgets.latency import Latency
from llmpruner.pruning.budgets.latency_cost import LatencyCost, LatencyTable
from llmpruner.pruning.budgets.sizes import counts
from llmpruner.pruning.budgets.timing import RUNS, WARM_UP, decode_one, falling, measure_latency

ALL = (0, 1, 2, 3)


def by_size(cached, token, path):
    """A machine that takes a microsecond for every weight."""
    layers = cached.model.get_submodule(path)
    each = [sum(p.numel() for p in layer.parameters()) / 1e3 for layer in layers]
    return [*each, sum(p.numel() for p in cached.model.parameters()) / 1e3 - sum(each)]


def measured(loaded, kinds, stopwatch=by_size, context=12):
    subject = BudgetSubject(loaded.model, loaded.graph, loaded.graph.of_kinds(kinds), loaded.family)
    return measure_latency(subject, context, stopwatch)


def test_the_table_describes_its_measurement(gqa):
    table = measured(gqa, ["mlp", "attention", "layer"])
    assert (table.dtype, table.context, table.device.split(",")[0]) == ("float32", 12, "cpu")
    inner, outer = table.timings
    assert (inner.layers, outer.layers) == (ALL, ())
    layer = gqa.graph.decoder_parameters / 4 / 1e3
    assert (inner.ms, outer.ms, outer.groups) == (pytest.approx(layer), pytest.approx((2 * 128 + 1) * 64 / 1e3), {})
    gone = {units: layer - (96 - units) * 3 * 64 / 1e3 for units in (72, 48, 24, 1)}
    assert dict(inner.groups["mlp"]) == pytest.approx(gone)
    assert [units for units, _ in inner.groups["attention"]] == [3, 2, 1]


def test_layers_of_other_sizes_have_their_own_measurement(gqa):
    graph = cut(gqa.model, gqa.graph, {"layers.1.mlp": range(50), "layers.2.mlp": range(50)}, gqa.family)
    table = measured(replace(gqa, graph=graph), ["mlp"])
    assert [timing.layers for timing in table.timings] == [(0, 3), (1, 2), ()]
    assert [timing.groups["mlp"][0][0] for timing in table.timings[:2]] == [72, 38]


def test_the_cost_is_the_measured_time_of_the_cut_model(gqa):
    """On a machine whose time is proportional to weights, what is cut within layers adds up exactly."""
    graph, kinds = gqa.graph, ["mlp", "attention", "query", "layer"]
    cost = LatencyCost(graph, graph.of_kinds(kinds), measured(gqa, kinds))
    kept = {
        "layers.0.mlp": range(33),
        "layers.1.attention": [0, 2],
        "layers.1.query": [0, 2, 4, 6],
        "layers": [0, 1, 3],
    }
    model = copy.deepcopy(gqa.model)
    cut(model, graph, kept, gqa.family)
    for numbers, subject in ((({}, ()), gqa.model), (counts(graph, kept), model)):
        expected = sum(by_size(CachedModel(subject), None, graph.layers))
        assert cost.value(cost.remaining(*numbers)) == pytest.approx(expected, rel=1e-6)
    assert cost.number(1_234_567_890_123) == "1,234.568"


def test_hidden_channels_scale_every_layer_and_what_is_outside(gqa):
    graph = gqa.graph
    cost = LatencyCost(graph, graph.of_kinds(["hidden", "mlp"]), measured(gqa, ["hidden", "mlp"]))
    model = copy.deepcopy(gqa.model)
    cut(model, graph, {"hidden": range(40)}, gqa.family)
    expected = sum(by_size(CachedModel(model), None, graph.layers))
    assert cost.value(cost.remaining({"hidden": 40})) == pytest.approx(expected, rel=1e-6)
    both = cost.remaining({"hidden": 40, "layers.1.mlp": 20})
    assert both < min(cost.remaining({"hidden": 40}), cost.remaining({"layers.1.mlp": 20}))


def test_a_plan_records_the_measurement_and_replays_without_another(gqa, monkeypatch):
    monkeypatch.setattr("llmpruner.pruning.budgets.timing.decode_one", by_size)
    settings = {"ratio": 0.25, "budget": "latency", "context": 12, "kinds": "mlp,attention", "importance": "l1"}
    settings["shape"] = "free"
    first = llmpruner.plan(gqa, **settings)
    assert LatencyTable.model_validate(first.target.measured).context == 12
    assert llmpruner.plan(gqa, **settings).to_json() == first.to_json()
    read = PruningPlan.parse(first.to_json(), "plan")
    assert read == first
    monkeypatch.setattr("llmpruner.pruning.budgets.timing.decode_one", None)
    before = sum(by_size(CachedModel(gqa.model), None, gqa.graph.layers))
    pruned = llmpruner.prune(gqa, plan=read)
    after = sum(by_size(CachedModel(pruned.model), None, pruned.graph.layers))
    assert after / before == pytest.approx(0.75, abs=0.003)
    assert pruned.outcome.budget.removed == pytest.approx(0.25, abs=0.003)


def test_the_stopwatch_sees_every_layer_and_the_rest(gqa):
    cached = CachedModel(gqa.model)
    cached.process(sample_tokens(gqa.model, 12))
    times = decode_one(cached.fork(), sample_tokens(gqa.model, 1), gqa.graph.layers)
    assert len(times) == 5 and min(times) > 0
    assert cached.cache.get_seq_length() == 12
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in gqa.model.model.layers)


def test_a_real_measurement_is_a_usable_table(gqa):
    """Of times on a shared machine only the magnitude is certain."""
    table = measured(gqa, ["mlp", "attention", "query", "hidden", "layer"], stopwatch=None)
    inner, outer = table.timings
    assert (set(inner.groups), set(outer.groups)) == ({"mlp", "attention", "query", "hidden"}, {"hidden"})
    assert all(ms > 0 for timing in table.timings for points in timing.groups.values() for _, ms in points)
    cost = LatencyCost(gqa.graph, gqa.graph.groups, table)
    assert cost.value(cost.remaining()) == pytest.approx(4 * inner.ms + outer.ms)
    reading, token = CachedModel(gqa.model), sample_tokens(gqa.model, 1)
    passes = timeit.repeat(lambda: reading.process(token), number=1, repeat=9)
    assert 0.2 < (4 * inner.ms + outer.ms) / (1e3 * min(passes)) < 5
    assert cost.remaining(gone=(1, 2)) < cost.remaining(gone=(1,)) < cost.remaining()


def test_what_takes_most_of_the_time_is_seen_to_save_it(catalog):
    """MLPs of 8,192 channels beside attention of 64: with half of them, a layer is faster on any machine. Of three
    measurements one is enough, as other programs may run meanwhile."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=8, vocab_size=128
    )
    family = catalog.family_for(config)
    wide = Model("wide", config, family, build_graph(family, config), model=random_instance(config), tokenizer=None)
    found = []
    for _ in range(3):
        timing = measured(wide, ["mlp"], stopwatch=None).timings[0]
        times = {8192: timing.ms, **dict(timing.groups["mlp"])}
        if times[1] < times[4096] < 0.9 * times[8192]:
            return
        found.append(times)
    raise AssertionError(found)


@given(st.dictionaries(st.integers(1, 50), st.floats(0.01, 3), min_size=1))
def test_times_that_never_rise_are_the_nearest_to_those_measured(levels):
    """The min-max formula of isotonic regression (Robertson, Wright and Dykstra, 1988, theorem 1.4.4): the smallest,
    over all starts before a point, of the largest, over all ends after it, of the mean of what lies between."""
    order = sorted(levels, reverse=True)
    times = [min(levels[units], 1.0) for units in order]
    count = range(len(times))
    expected = [
        min(max(fmean(times[first : last + 1]) for last in count[at:]) for first in count[: at + 1]) for at in count
    ]
    found = falling(levels)
    assert list(found) == order
    assert list(found.values()) == pytest.approx(expected)


def test_what_rises_is_pooled():
    assert falling({8: 0.9, 4: 0.5, 2: 0.7, 1: 0.1}) == pytest.approx({8: 0.9, 4: 0.6, 2: 0.6, 1: 0.1})
    assert falling({4: 1.2, 2: 1.1}) == {4: 1.0, 2: 1.0}


def test_a_context_beyond_the_model_is_refused(gqa):
    most = 128 - RUNS - WARM_UP
    with pytest.raises(SelectionError, match=f"--context 124 .* the model's 128 positions; give at most {most}$"):
        measured(gqa, ["mlp"], context=124)
    measured(gqa, ["mlp"], context=most)


def test_layers_that_run_twice_cannot_be_timed(gqa):
    gqa.model.model.layers[2] = gqa.model.model.layers[1]
    with pytest.raises(UnsupportedModelError, match="does not run each of its layers once"):
        decode_one(CachedModel(gqa.model), sample_tokens(gqa.model, 1), gqa.graph.layers)


def test_the_table_of_another_model_is_refused(gqa):
    other = {"device": "x", "dtype": "float32", "context": 1, "timings": [{"layers": "0-1", "ms": 1.0}]}
    with pytest.raises(PlanError, match="measured on another model"):
        Latency().cost(BudgetSubject(gqa.model, gqa.graph, gqa.graph.groups, gqa.family), other)


def test_cached_tokens_are_copied_not_shared(gqa):
    cached = CachedModel(gqa.model)
    cached.process(sample_tokens(gqa.model, 3))
    other = cached.fork()
    other.process(sample_tokens(gqa.model, 1))
    assert (cached.cache.get_seq_length(), other.cache.get_seq_length()) == (3, 4)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_no_fault_of_the_model(error, gqa, monkeypatch):
    cached = CachedModel(gqa.model)

    def forward(**_):
        raise error

    monkeypatch.setattr(gqa.model, "forward", forward)
    with pytest.raises(ModelError, match=r"memory is too small to run the llama model .* a smaller batch"):
        cached.process(sample_tokens(gqa.model, 4))
