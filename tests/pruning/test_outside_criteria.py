"""What a criterion of a package is shown, against direct computations with hooks: a moving average over samples, and
the outputs of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pytest
import torch
from criteria_cases import layers_of, make, tokens
from pydantic import Field

from llmpruner import Catalog, ComponentSettings, ImportanceCriterion, ParameterSignals, Product, Role, Signal
from llmpruner.plugins.manager import plugin_manager
from llmpruner.pruning.criteria.estimate import estimate

CALIBRATION = tokens(6, 16)
LENGTH = 16


@pytest.fixture(autouse=True)
def small_micro_batches(monkeypatch, full_precision):
    monkeypatch.setattr("llmpruner.engine.walk.TOKENS_AT_ONCE", 2 * LENGTH)
    monkeypatch.setattr("llmpruner.engine.gradients.TOKENS_WITH_GRADIENTS", 4 * LENGTH)
    monkeypatch.setattr("llmpruner.models.positions.LOGIT_ELEMENTS", 4 * 5 * 96)


class Ema(ImportanceCriterion):
    """Exponential moving average over the samples t, in calibration order, of a_t = Σ|g·x| (or Σ|x|) over the tokens of
    a sample: m_t = d·m_(t−1) + (1 − d)·a_t with m_0 = 0, so that m_T = Σ_t (1 − d)·d^(T−t)·a_t, which is a sum."""

    name = "ema"
    summary = "exponential moving average over samples of |gradient × input| or |input| of a channel"
    roles = frozenset({Role.CONSUMES})

    class Settings(ComponentSettings):
        of: Literal["gradient", "activation"] = Field("gradient", description="|gradient × input|, or |input|.")
        decay: float = Field(0.9, gt=0, lt=1, description="d, the share that each sample leaves of those before it.")

    settings: Settings

    @property
    def signals(self) -> frozenset[Signal]:
        product = Signal.PRODUCT_GRAD if self.settings.of == "gradient" else Signal.PRODUCT
        return frozenset({Signal.WEIGHT, product})

    def measure(self, product: Product) -> Mapping[str, torch.Tensor]:
        value = product.inputs.abs()
        if self.settings.of == "gradient":
            value = value * product.input_grads.abs()
        decay = self.settings.decay
        share = (1 - decay) * decay ** (product.num_samples - 1 - product.samples).double()
        return {"ema": share @ value.double()}

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        if signals.products is None:
            return torch.zeros_like(signals.weight)
        return signals.over_inputs(signals.products.sums["ema"])


def scores_of(loaded, chosen, groups) -> dict[str, torch.Tensor]:
    return estimate(loaded.model, loaded.graph, groups, chosen, CALIBRATION)


def expert_output(experts, number: int, rows: torch.Tensor) -> torch.Tensor:
    """f_j(x), as the module of experts computes it."""
    if hasattr(experts, "down_proj_bias"):
        inner = experts._apply_gate(rows @ experts.gate_up_proj[number] + experts.gate_up_proj_bias[number])
        return inner @ experts.down_proj[number] + experts.down_proj_bias[number]
    gate, up = (rows @ experts.gate_up_proj[number].T).chunk(2, -1)
    return (experts.act_fn(gate) * up) @ experts.down_proj[number].T


@pytest.mark.parametrize(
    ("name", "renormalize"), [("mixtral", True), ("qwen2_moe", True), ("qwen2_moe", False), ("gpt_oss", False)]
)
def test_reap_is_the_mean_of_gate_times_output_norm_over_an_experts_tokens(name, renormalize):
    loaded = make(name)
    groups = loaded.graph.of_kinds(["expert"])
    reap = Catalog(plugin_manager(entry_points=False)).criteria["expert-reap"](renormalize=renormalize)
    scores = scores_of(loaded, reap, groups)
    for group in groups:
        experts = next(m for n, m in layers_of(loaded)[group.layer].named_modules() if n.endswith("experts"))
        seen = []
        handle = experts.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args))
        with torch.no_grad():
            loaded.model(input_ids=CALIBRATION.input_ids, use_cache=False)
        handle.remove()
        hidden, chosen, gates = seen[0]
        # Qwen2 takes its weights as a softmax over all experts gives them.
        assert torch.allclose(gates.sum(1), torch.ones(len(gates))) == (name != "qwen2_moe")
        if renormalize:
            gates = gates / gates.sum(1, keepdim=True)
        expected = []
        for number in range(4):
            token, rank = torch.where(chosen == number)
            outputs = expert_output(experts, number, hidden[token]).detach()
            expected.append((gates[token, rank] * outputs.norm(dim=-1)).sum() / max(len(token), 1))
        torch.testing.assert_close(scores[group.name], torch.stack(expected).double(), rtol=1e-3, atol=1e-6)


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
    scores = scores_of(loaded, Ema(of=of, decay=0.7), [found])[found.name]
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
    scores = scores_of(loaded, Ema(of="activation"), [group])[group.name]
    torch.testing.assert_close(scores, average.sum(0), rtol=1e-3, atol=1e-9)
