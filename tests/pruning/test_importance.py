"""Criteria against their equations, and units credited with exactly what they own."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from llmpruner.calibration.calibration import CalibrationSet
from llmpruner.calibration.written import self_generated
from llmpruner.pruning.criteria.estimate import estimate, reduce_spans
from llmpruner.pruning.criteria.taylor import Taylor, Variant
from llmpruner.pruning.criteria.weights import L1, L2
from llmpruner.settings import Reduction


def saliency(variant, w, g, h):
    first, second = w * g, 0.5 * w.square() * h
    return {"element1": first.abs(), "element2": second, "mix": (first - second).abs(), "vector": first}[variant]


@pytest.mark.parametrize("variant", get_args(Variant))
def test_taylor_follows_the_paper(gqa, variant):
    """With gradients of one sample at a time, by plain autograd."""
    calibration = CalibrationSet(self_generated(gqa.model, None, 4, 12, 3), "self")
    mlp = gqa.model.model.layers[2].mlp
    weights, axes = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight], (0, 0, 1)
    losses = (gqa.model(row[None], labels=row[None]).loss for row in calibration.input_ids)
    samples = [torch.autograd.grad(loss, weights) for loss in losses]
    expected = torch.zeros(96, dtype=torch.float64)
    for weight, axis, grads in zip(weights, axes, map(torch.stack, zip(*samples, strict=True)), strict=True):
        found = saliency(variant, weight.detach(), grads.mean(0), grads.square().mean(0))
        expected += found.double().sum(1 - axis).abs()
    group = gqa.graph.by_name["layers.2.mlp"]
    scores = estimate(gqa.model, gqa.graph, [group], Taylor(variant=variant), calibration)
    torch.testing.assert_close(scores["layers.2.mlp"], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(("criterion", "power"), [(L1(), 1), (L2(), 2)])
def test_magnitude(gqa, criterion, power):
    mlp = gqa.model.model.layers[1].mlp
    parts = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T]
    spans = torch.stack([p.detach().double().abs().pow(power).sum(1) for p in parts])
    group = gqa.graph.by_name["layers.1.mlp"]
    reduced = {"sum": spans.sum(0), "mean": spans.mean(0), "max": spans.amax(0), "last": spans[-1]}
    reduced["prod"] = spans.prod(0) ** (1 / 3)
    assert set(reduced) == set(get_args(Reduction))
    for name, expected in reduced.items():
        scores = estimate(gqa.model, gqa.graph, [group], criterion, None, reduction=name)
        torch.testing.assert_close(scores[group.name], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_a_product_of_many_spans_is_neither_zero_nor_infinite(scale):
    """The residual stream of the demo model has 273 spans."""
    scores = scale * torch.rand(273, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = reduce_spans(scores, "prod")
    assert torch.equal(found.argsort(), (scores / scale * 2.7).prod(0).argsort())
    torch.testing.assert_close(found / scale, (scores / scale * 2.7).prod(0) ** (1 / 273) / 2.7)
    scores[3, 1], scores[4, 2] = 0.0, -scores[4, 2]
    found = reduce_spans(scores, "prod")
    assert found[1] == 0 and found[2] < 0 < found[3]


def test_a_kv_group_is_credited_with_its_own_query_heads_alone(gqa):
    attention = gqa.model.model.layers[1].self_attn
    with torch.no_grad():
        attention.q_proj.weight[5 * 8 : 6 * 8] = 50.0
    group = gqa.graph.by_name["layers.1.attention"]
    before = estimate(gqa.model, gqa.graph, [group], L1(), None)[group.name]
    assert int(before.argmax()) == 2, "query head 5 of 8 belongs to KV head 2 of 4"
    others = before[[0, 1, 3]]
    with torch.no_grad():
        attention.q_proj.weight[5 * 8 : 6 * 8] = 0.0
    after = estimate(gqa.model, gqa.graph, [group], L1(), None)[group.name]
    torch.testing.assert_close(after[[0, 1, 3]], others, rtol=0, atol=0)


def test_a_tied_embedding_counts_once(catalog, loaded):
    group = loaded.graph.by_name["hidden"]
    scores = estimate(loaded.model, loaded.graph, [group], L1(), None)["hidden"]
    axes = {(s.parameter, s.axis) for s in group.spans if s.parameter not in loaded.graph.ties}
    expected = torch.zeros(64, dtype=torch.float64)
    for name, axis in axes:
        weight = loaded.model.get_parameter(name).detach().double().abs()
        expected += weight.sum([a for a in range(weight.dim()) if a != axis]) if weight.dim() > 1 else weight
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)


def test_a_layer_scores_everything_in_it(gqa):
    scores = estimate(gqa.model, gqa.graph, [gqa.graph.by_name["layers"]], L1(), None)["layers"]
    expected = [sum(p.detach().double().abs().sum() for p in layer.parameters()) for layer in gqa.model.model.layers]
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-5, atol=0)
