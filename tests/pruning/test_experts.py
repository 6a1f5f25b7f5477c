"""Criteria for experts, on mixtures with planted experts: which a criterion ranks rightly, and which it cannot see."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from criteria_cases import called, experts_of, make, opened, tokens
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import llmpruner
from llmpruner import Catalog, ImportanceCriterion, Role
from llmpruner.discovery.tiny import random_instance, small_config
from llmpruner.models.model import Model
from llmpruner.plugins.manager import PluginManager
from llmpruner.pruning.criteria.estimate import estimate

pytestmark = pytest.mark.usefixtures("full_precision")

ALL = ["mixtral", "deepseek_v3", "olmoe", "qwen3_moe", "deepseek_v2"]
TYPES = [*ALL[:3], *(pytest.param(name, marks=pytest.mark.long) for name in ALL[3:])]
CRITERIA = Catalog(PluginManager(entry_points=False))[ImportanceCriterion]
UNUSED, SILENT, CRUCIAL = 0, 4, 2
"""Never chosen by the router; often chosen, with outputs of zero; rarely chosen, with large outputs. The two that
can go are in different halves, as DeepSeek-V3 chooses from groups of experts."""


@functools.cache
def planted(model_type: str) -> Model:
    config = small_config(CONFIG_MAPPING[model_type](**({"num_experts_per_tok": 2} if "v2" in model_type else {})))
    loaded = opened(random_instance(config))
    model = loaded.network
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Channels 0 and 1 of the residual stream keep what the embedding gives: a constant, so that the first column of
        # a router is a bias, and a mark of one token in ten.
        for span in loaded.graph.by_name["hidden"].spans:
            value = {Role.NORM: 1.0, Role.PRODUCES: 0.0}.get(span.role)
            if value is not None:
                model.get_parameter(span.parameter).narrow(span.axis, 0, 2).fill_(value)
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = 6 * embedding.std()
        embedding[: len(embedding) // 10, 1] = 6 * embedding.std()
        for group in loaded.graph.of_kinds(["expert"]):
            for span in group.spans:
                weight = model.get_parameter(span.parameter)
                if weight.dim() == 2:
                    weight.normal_(generator=generator).mul_(0.5 * weight.shape[1] ** -0.5)
                    weight[:, :2] = 0.0
                    weight[UNUSED, 0], weight[SILENT, 0] = -100.0, 0.4
                    weight[CRUCIAL, 0], weight[CRUCIAL, 1] = -1.0, 4.0
                elif "down_proj" in span.parameter:
                    weight[SILENT] = 0.0
                    weight[CRUCIAL] *= 8
    return loaded


@functools.cache
def scores(model_type: str, name: str) -> torch.Tensor:
    """(layers, experts)"""
    loaded = planted(model_type)
    groups = loaded.graph.of_kinds(["expert"])
    criterion = CRITERIA[name]()
    vocabulary = loaded.network.get_input_embeddings().weight.shape[0]
    found = estimate(loaded.network, loaded.graph, groups, criterion, tokens(16, 32, vocabulary=vocabulary))
    return torch.stack([found[group.name] for group in groups])


@pytest.mark.parametrize("model_type", TYPES)
def test_criteria_see_planted_experts(model_type):
    for name in ("expert-reap", "expert-norm"):
        for layer in scores(model_type, name):
            assert layer[UNUSED] == layer[SILENT] == 0
            assert sorted(layer.tolist())[2] > 0 and int(layer.argmax()) == CRUCIAL
    total, frequency = (scores(model_type, f"expert-{name}") for name in ("contribution", "frequency"))
    assert (total[:, [UNUSED, SILENT]] == 0).all() and (total > 0).sum() == 6 * len(total)
    # Above that of experts as often used, by the factor of its outputs, and not above all, as in the mean.
    per_use = total / frequency.clamp_min(1e-9)
    assert (per_use.argmax(1) == CRUCIAL).all()
    torch.testing.assert_close(frequency.sum(1), torch.ones(len(frequency), dtype=torch.float64))
    assert (frequency[:, UNUSED] == 0).all()
    first = frequency[0]
    assert first[SILENT] > first.median(), "always chosen, and worth nothing"
    assert first[CRUCIAL] < first[SILENT], "worth most, and rarely chosen"


def expert_output(experts, number: int, rows: torch.Tensor) -> torch.Tensor:
    if hasattr(experts, "down_proj_bias"):
        inner = experts._apply_gate(rows @ experts.gate_up_proj[number] + experts.gate_up_proj_bias[number])
        return inner @ experts.down_proj[number] + experts.down_proj_bias[number]
    gate, up = (rows @ experts.gate_up_proj[number].T).chunk(2, -1)
    return (experts.act_fn(gate) * up) @ experts.down_proj[number].T


@pytest.mark.parametrize(
    ("name", "renormalize"), [("mixtral", True), ("qwen2_moe", True), ("qwen2_moe", False), ("gpt_oss", False)]
)
def test_reap_is_the_mean_of_gate_times_output_norm_over_an_experts_tokens(name, renormalize):
    loaded, calibration = make(name), tokens(6, 16)
    groups = loaded.graph.of_kinds(["expert"])
    reap = CRITERIA["expert-reap"](renormalize=renormalize)
    found = estimate(loaded.network, loaded.graph, groups, reap, calibration)
    for group in groups:
        path, experts = experts_of(loaded.network, group.layer)
        (hidden, chosen, gates), _ = called(loaded.network, path, calibration.input_ids)
        # Qwen2 takes its weights as a softmax over all experts gives them.
        assert torch.allclose(gates.sum(1), torch.ones(len(gates))) == (name != "qwen2_moe")
        if renormalize:
            gates = gates / gates.sum(1, keepdim=True)
        expected = []
        for number in range(4):
            token, rank = torch.where(chosen == number)
            outputs = expert_output(experts, number, hidden[token]).detach()
            expected.append((gates[token, rank] * outputs.norm(dim=-1)).sum() / max(len(token), 1))
        torch.testing.assert_close(found[group.name], torch.stack(expected).double(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "model_type", [t if t == "deepseek_v3" else pytest.param(t, marks=pytest.mark.long) for t in [*ALL, "aria_text"]]
)
def test_a_quarter_of_the_experts_goes_with_their_rows_of_the_router(model_type, monkeypatch, tmp_path):
    """The dead ones of every layer. The result is a stock checkpoint, with the logits of the dense model in which the
    silent expert is not chosen any more."""
    loaded = planted(model_type)
    text = tokens(16, 32, vocabulary=loaded.network.get_input_embeddings().weight.shape[0])
    monkeypatch.setattr("llmpruner.pipeline.calibrate", lambda *_: text)
    plan = llmpruner.plan(
        loaded, unit_ratio=0.25, kinds="expert", layers="all", importance="expert-reap", samples=16, length=32
    )
    groups = loaded.graph.of_kinds(["expert"])
    for group in groups:
        kept = plan.cuts[group.name].kept
        assert sorted(set(range(8)) - set(kept)) == [UNUSED, SILENT]
    pruned = llmpruner.prune(
        replace(loaded, network=copy.deepcopy(loaded.network)), plan=plan, output=tmp_path / "pruned"
    )
    assert pruned.outcome is not None
    removed = pruned.outcome.parameters_before - pruned.outcome.parameters_after
    assert removed == 2 * sum(loaded.graph.parameters_per_unit(group) for group in groups)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32)
    dense = copy.deepcopy(loaded.network)
    ids = text.input_ids[:4]
    with torch.no_grad():
        for group in groups:
            router = next(span.parameter for span in group.spans if len(loaded.graph.shapes[span.parameter]) == 2)
            dense.get_parameter(router)[SILENT, 0] = -1e4
        wanted = dense(ids).logits
        assert (stock(ids).logits - wanted).norm() < 1e-4 * wanted.norm()
        written = stock.generate(ids[:1], max_new_tokens=4, do_sample=False)
    assert written.shape == (1, 36)
