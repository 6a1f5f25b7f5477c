"""Criteria of packages outside: REAP, LLM-Streamline and a moving average, against direct computations with hooks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from criteria_cases import boundaries, layers_of, make, tokens

from llmpruner.errors import LlmprunerError, SelectionError
from llmpruner.pruning.criteria.estimate import estimate
from llmpruner.testing import CriterionConformance, catalog_with

PACKAGES = Path(__file__).parents[1] / "packages"
CALIBRATION = tokens(6, 16)
LENGTH = 16


@pytest.fixture(autouse=True)
def small_micro_batches(monkeypatch, full_precision):
    monkeypatch.setattr("llmpruner.engine.walk.TOKENS_AT_ONCE", 2 * LENGTH)
    monkeypatch.setattr("llmpruner.engine.gradients.TOKENS_WITH_GRADIENTS", 4 * LENGTH)
    monkeypatch.setattr("llmpruner.models.positions.LOGIT_ELEMENTS", 4 * 5 * 96)


def module(name: str):
    folder = str(PACKAGES / f"llmpruner-{name}")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(f"llmpruner_{name}")
    finally:
        sys.path.remove(folder)


def criterion(name: str, **settings):
    return catalog_with(module(name)).criteria[name](**settings)


def scores_of(loaded, chosen, groups) -> dict[str, torch.Tensor]:
    return estimate(loaded.model, loaded.graph, groups, chosen, CALIBRATION)


def expert_output(experts, number: int, rows: torch.Tensor) -> torch.Tensor:
    """f_j(x), as the module of experts computes it."""
    if hasattr(experts, "down_proj_bias"):
        inner = experts._apply_gate(rows @ experts.gate_up_proj[number] + experts.gate_up_proj_bias[number])
        return inner @ experts.down_proj[number] + experts.down_proj_bias[number]
    gate, up = (rows @ experts.gate_up_proj[number].T).chunk(2, -1)
    return (experts.act_fn(gate) * up) @ experts.down_proj[number].T


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_reap_is_the_mean_of_gate_times_output_norm_over_an_experts_tokens(name):
    loaded = make(name)
    groups = loaded.graph.of_kinds(["expert"])
    scores = scores_of(loaded, criterion("reap"), groups)
    for group in groups:
        experts = next(m for n, m in layers_of(loaded)[group.layer].named_modules() if n.endswith("experts"))
        seen = []
        handle = experts.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args))
        with torch.no_grad():
            loaded.model(input_ids=CALIBRATION.input_ids, use_cache=False)
        handle.remove()
        hidden, chosen, gates = seen[0]
        expected = []
        for number in range(4):
            token, rank = torch.where(chosen == number)
            outputs = expert_output(experts, number, hidden[token]).detach()
            expected.append((gates[token, rank] * outputs.norm(dim=-1)).sum() / max(len(token), 1))
        torch.testing.assert_close(scores[group.name], torch.stack(expected).double(), rtol=1e-3, atol=1e-6)


def test_an_expert_without_tokens_scores_zero_in_reap():
    loaded = make("mixtral")
    for layer in layers_of(loaded):
        layer.mlp.gate.register_forward_hook(lambda _, __, out: (out[0], out[1], out[2].clamp(max=2)))
    group = loaded.graph.by_name["layers.1.experts"]
    scores = scores_of(loaded, criterion("reap"), [group])[group.name]
    assert float(scores[3]) == 0 and bool((scores[:3] > 0).all())


def test_reap_scores_nothing_but_experts():
    loaded = make("mixtral")
    with pytest.raises(SelectionError, match="criterion reap does not score 'mlp' units; use --kinds expert"):
        scores_of(loaded, criterion("reap"), loaded.graph.of_kinds(["mlp"]))


@pytest.mark.parametrize("length", [1, 2])
def test_streamline_finds_the_block_that_changes_the_stream_least(length):
    loaded = make("llama-gqa")
    states = boundaries(loaded, CALIBRATION.input_ids)
    blocks = {
        tuple(range(start, start + length)): float(
            torch.cosine_similarity(states[start].double(), states[start + length].double(), dim=-1).mean()
        )
        for start in range(3 - length + 1)
    }
    expected = [1 - max(value for block, value in blocks.items() if layer in block) for layer in range(3)]
    scores = scores_of(loaded, criterion("streamline", length=length), loaded.graph.of_kinds(["layer"]))["layers"]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)
    assert sorted(scores.argsort(stable=True)[:length].tolist()) == list(max(blocks, key=blocks.get))


def test_streamline_refuses_a_block_longer_than_the_model():
    loaded = make("llama-gqa")
    with pytest.raises(LlmprunerError, match="a block of 4 layers, and the model has 3"):
        scores_of(loaded, criterion("streamline", length=4), loaded.graph.of_kinds(["layer"]))


@pytest.mark.parametrize("of", ["activation", "gradient"])
@pytest.mark.parametrize(
    ("name", "group", "reader", "width"),
    [
        ("llama-gqa", "layers.1.mlp", "mlp.down_proj", 1),
        ("llama-gqa", "layers.1.attention", "self_attn.o_proj", 16),
        ("gpt2", "layers.1.mlp", "mlp.c_proj", 1),
    ],
)
def test_ema_follows_the_samples_in_their_order(of, name, group, reader, width):
    loaded = make(name)
    found = next(g for g in loaded.graph.groups if g.kind == group.split(".")[2] and g.layer == 1)
    average = 0.0
    inputs = []
    weights = layers_of(loaded)[1].get_submodule(reader)
    handle = weights.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for row in CALIBRATION.input_ids:
        loss = loaded.model(row[None], labels=row[None], use_cache=False).loss
        x = inputs.pop()
        (grad,) = torch.autograd.grad(loss, x)
        value = (x * grad).abs() if of == "gradient" else x.abs()
        average = 0.7 * average + 0.3 * value.detach().double().flatten(0, -2).sum(0)
    handle.remove()
    scores = scores_of(loaded, criterion("ema", of=of, decay=0.7), [found])[found.name]
    torch.testing.assert_close(scores, average.view(-1, width).sum(1), rtol=1e-3, atol=1e-9)


def test_ema_follows_the_samples_of_each_expert():
    """Of an expert, only the tokens routed to it count, each in its own sample."""
    loaded = make("mixtral")
    group = loaded.graph.by_name["layers.1.mlp"]
    experts = layers_of(loaded)[1].mlp.experts
    average = torch.zeros(4, 56, dtype=torch.float64)
    seen = []
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        for row in CALIBRATION.input_ids:
            loaded.model(row[None], use_cache=False)
            hidden, chosen, _ = seen.pop()
            value = torch.zeros_like(average)
            for number in range(4):
                gate, up = (hidden[(chosen == number).any(1)] @ experts.gate_up_proj[number].T).chunk(2, -1)
                value[number] = (experts.act_fn(gate) * up).abs().double().sum(0)
            average = 0.9 * average + 0.1 * value
    handle.remove()
    scores = scores_of(loaded, criterion("ema", of="activation"), [group])[group.name]
    torch.testing.assert_close(scores, average.sum(0), rtol=1e-3, atol=1e-9)


def kit(name: str, model: str | None = None) -> type:
    """The conformance kit for a criterion of a package that is not installed."""
    members = {"criterion": getattr(module(name), name.capitalize())}
    if model is not None:
        members["loaded"] = lambda self: make(model)
    return type(name, (CriterionConformance,), members)


CHECKS = [n for n in vars(CriterionConformance) if n.startswith("test_") and "entry_point" not in n]


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("name", "model"), [("reap", "mixtral"), ("streamline", None), ("ema", None)])
def test_they_conform(name, model, check):
    getattr(kit(name, model)(), check)()
