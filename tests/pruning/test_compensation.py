"""Weights that read removed units are fitted again: nearer to the dense model, and nothing else is changed."""

import copy
import json
from dataclasses import asdict
from math import inf
from types import SimpleNamespace

import pytest
import torch
from criteria_cases import layers_of, make, observed, tokens

from llmpruner import UnsupportedModelError
from llmpruner.discovery.cut import cut
from llmpruner.discovery.oracle import random_plan
from llmpruner.engine.ranks import SINGLE
from llmpruner.models.surgery import silence
from llmpruner.pruning.compensation import least_squares
from llmpruner.pruning.compensation.base import RepairTask
from llmpruner.pruning.compensation.compensations import BiasShift, Refit
from llmpruner.pruning.compensation.least_squares import WeightFitter, write_all
from llmpruner.pruning.compensation.readers import Reader, readers_of
from llmpruner.structure.coupling import LAYER, Role
from llmpruner.structure.kept import removed_layers

pytestmark = pytest.mark.usefixtures("full_precision")

CALIBRATION, HELD_OUT = tokens(48, 32, seed=0), tokens(8, 32, seed=9).input_ids
IDS = CALIBRATION.input_ids

PLANS = [
    *(("llama-gqa", kinds) for kinds in ("mlp", "attention", "query", "hidden", "layer+mlp", "mlp+attention+hidden")),
    *((name, "mlp+attention") for name in ("gpt2", "granite", "gemma2", "glm")),
    ("granite", "hidden"), ("mixtral", "mlp+attention"), ("mixtral", "hidden"),
    ("gpt_oss", "mlp"), ("olmo2", "attention"), ("minimax_m2", "query"), ("falcon-7b", "mlp+query"),
    # Laid out as others.
    *(pytest.param(*plan, marks=pytest.mark.long) for plan in (
        ("llama-mha", "mlp+attention"), ("phi", "mlp+attention"), ("falcon", "mlp+attention"), ("glm", "hidden"),
        ("gptj", "mlp+attention"),
    )),
]  # fmt: skip


def plan_for(loaded, kinds: str) -> dict[str, list[int]]:
    wanted = kinds.split("+")
    groups = [g for g in loaded.graph.of_kinds(wanted) if g.units > g.minimum and g.kind != LAYER]
    kept = random_plan(groups, seed=1, uneven=False)
    if LAYER in wanted:
        kept["layers"] = [0, 2]
    return kept


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=HELD_OUT, use_cache=False).logits.double()


def divergence(model, dense: torch.Tensor) -> float:
    """KL to the dense model, nats per token."""
    one, other = dense.log_softmax(-1), logits(model).log_softmax(-1)
    return float((one.exp() * (one - other)).sum(-1).mean())


def cut_copy(loaded, kept, model=None):
    model = copy.deepcopy(model or loaded.network)
    cut(model, loaded.graph, kept, loaded.family)
    return model


def repaired(loaded, kept, compensation=Refit):
    model = copy.deepcopy(loaded.network)
    made = compensation() if isinstance(compensation, type) else compensation
    return model, made.repair(RepairTask(model, loaded.graph, kept, CALIBRATION))


def skipping(model, loaded, kept):
    """The repaired model at full size, its removed layers skipped."""
    model = copy.deepcopy(model)
    for number in removed_layers(loaded.graph, kept):
        model.get_submodule(f"{loaded.graph.layers}.{number}").register_forward_hook(
            lambda _, args, out: args[0] if isinstance(out, torch.Tensor) else (args[0], *out[1:])
        )
    silence(model, loaded.graph, {name: units for name, units in kept.items() if name != "layers"})
    return model


def ridge_fit(x: torch.Tensor, target: torch.Tensor, old: torch.Tensor, ridge: float) -> torch.Tensor:
    """The least-squares fit in closed form; the distance from the ``old`` weights counts by ``ridge``."""
    gram = x.T @ x
    strength = ridge * float(gram.diagonal().mean())
    return torch.linalg.solve(gram + strength * torch.eye(len(gram), dtype=x.dtype), x.T @ target + strength * old.T).T


@pytest.mark.parametrize(("name", "kinds"), PLANS)
def test_a_repaired_model_is_nearer_to_the_dense_one(name, kinds):
    loaded = make(name)
    kept = plan_for(loaded, kinds)
    dense = logits(loaded.network)
    plain = divergence(cut_copy(loaded, kept), dense)
    model, fits = repaired(loaded, kept)
    after = cut_copy(loaded, kept, model)
    assert divergence(after, dense) < 0.9 * plain
    assert any(fit.ridge is not None for fit in fits)
    # The oracle: removed units contribute nothing already before the cut.
    reference = logits(skipping(model, loaded, kept))
    assert float((logits(after) - reference).abs().max()) < 2e-4 * (1 + float(reference.abs().max()))


@pytest.mark.parametrize("name", ["falcon", "falcon-7b"])
def test_outputs_that_the_layer_adds_to_in_place_are_fitted_as_they_were(name):
    """Falcon without biases adds the outputs of attention to the tensor that the MLP's last product returned."""
    loaded = make(name)
    kept = plan_for(loaded, "mlp")
    added = copy.deepcopy(loaded)
    for layer in layers_of(added):
        # The same sum, of a tensor of its own.
        layer.mlp.register_forward_hook(lambda _, __, output: output.clone())
    (one, fits), (other, wanted) = (repaired(each, kept) for each in (loaded, added))
    assert fits == wanted
    assert all(torch.equal(tensor, other.state_dict()[n]) for n, tensor in one.state_dict().items())


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("llama-gqa", "mlp+attention+hidden"), ("gpt2", "mlp"), ("mixtral", "mlp"), ("llama-gqa", "mlp of layer 1")],
)
def test_nothing_but_consumers_and_zeroed_rows_changes(name, kinds):
    loaded = make(name)
    kept = {"layers.1.mlp": list(range(30))} if "layer 1" in kinds else plan_for(loaded, kinds)
    model, _ = repaired(loaded, kept)
    groups = [loaded.graph.by_name[name] for name in kept]
    may = {s.parameter for g in groups for s in g.spans_with(Role.CONSUMES)}
    may |= {s.parameter for g in groups if g.is_normalized for s in g.spans_with(Role.PRODUCES)}
    may |= {p.replace("weight", "bias") for p in may}
    for parameter, before in loaded.network.state_dict().items():
        if parameter not in may:
            assert torch.equal(model.state_dict()[parameter], before), parameter


def test_a_single_cut_is_the_least_squares_fit():
    """One down_proj, nothing cut before it: mix does not matter, and the answer is in closed form."""
    loaded = make("llama-gqa")
    kept = {"layers.0.mlp": list(range(40))}
    model, (fit,) = repaired(loaded, kept)
    old = loaded.network.model.layers[0].mlp.down_proj.weight.detach().double()
    x, _ = observed(loaded.network, "model.layers.0.mlp.down_proj", IDS)
    expected = ridge_fit(x[:, :40], x @ old.T, old[:, :40], fit.ridge)
    new = model.model.layers[0].mlp.down_proj.weight.detach()
    torch.testing.assert_close(new[:, :40].double(), expected, rtol=2e-3, atol=2e-4)
    assert not bool(new[:, 40:].any())
    assert fit.rows == IDS.numel()


def test_targets_are_the_dense_models_also_after_the_first_fit_of_a_layer():
    """With hidden channels cut, the queries are fitted first; the targets of gate and up come from a dense model
    whose queries are still its own."""
    loaded = make("llama-gqa")
    kept = plan_for(loaded, "hidden")
    model, _ = repaired(loaded, kept)
    path = "model.layers.0.mlp.up_proj"
    found = readers_of(loaded.graph, kept, 0)[f"{path}.weight"]
    _, target = observed(loaded.network, path, IDS)
    x, outputs = observed(skipping(model, loaded, kept), path, IDS)
    x = x[:, found.kept]
    floor = float((x @ torch.linalg.lstsq(x, target).solution - target).norm())
    assert float((outputs - target).norm()) < 1.1 * floor


@pytest.mark.parametrize(
    ("name", "units", "first"),
    [("olmo2.attention", 3, "mlp"), ("minimax_m2.query", 6, "mlp"), ("llama-gqa.attention", 3, "attention")],
)
def test_heads_are_fitted_to_what_the_uncut_layer_computes(name, units, first):
    """In layer 1, whose hidden states layer 0 has changed; with ``mix = 0`` the dense model's do not matter. The first
    two have a norm over all heads; in the third the MLP of layer 0 reads what its attention has lost."""
    name, kind = name.split(".")
    loaded = make(name)
    kept = {f"layers.0.{first}": list(range(20 if first == "mlp" else 2))}
    kept |= {f"layers.1.{kind}": [unit for unit in range(units) if unit != 1]}
    model, fits = repaired(loaded, kept, Refit(mix=0))
    weight = f"{loaded.graph.layers}.1.self_attn.o_proj.weight"
    (fit,) = [fit for fit in fits if fit.parameter == weight]

    uncut = copy.deepcopy(model)
    for parameter, values in loaded.network.state_dict().items():
        if ".1.self_attn." in parameter:
            uncut.get_parameter(parameter).data.copy_(values)

    path = weight.removesuffix(".weight")
    x, target = observed(model, path, IDS)[0], observed(uncut, path, IDS)[1]
    index = readers_of(loaded.graph, kept, 1)[weight].kept
    x, old = x[:, index], loaded.network.get_parameter(weight).detach().double()[:, index]
    expected = ridge_fit(x, target, old, fit.ridge)
    new = model.get_parameter(weight).detach().double()[:, index]
    torch.testing.assert_close(new, expected, rtol=2e-3, atol=2e-4)


def test_consumers_in_use_order_are_told_apart_although_memory_is_used_again():
    loaded = make("llama-gqa")
    _, fits = repaired(loaded, plan_for(loaded, "mlp+attention"))
    of_layer = [fit.parameter.split("layers.")[1] for fit in fits if fit.parameter.startswith("model.layers.1.")]
    assert of_layer == ["1.self_attn.o_proj.weight", "1.mlp.down_proj.weight"]


def test_a_weight_without_a_watched_product_is_reported_and_zeroed(monkeypatch):
    loaded = make("llama-gqa")
    kept = {"layers.1.mlp": list(range(30))}
    model = copy.deepcopy(loaded.network)
    mlp = model.model.layers[1].mlp
    mlp.down_proj.forward = lambda x: torch.einsum("bti,oi->bto", x, mlp.down_proj.weight)
    monkeypatch.setattr("llmpruner.engine.products._PRODUCTS", {})
    (fit,) = Refit().repair(RepairTask(model, loaded.graph, kept, CALIBRATION))
    assert (fit.parameter, fit.rows, fit.ridge) == ("model.layers.1.mlp.down_proj.weight", 0, None)
    assert not bool(mlp.down_proj.weight[:, 30:].any())


def test_experts_are_fitted_one_by_one():
    loaded = make("mixtral")
    _, fits = repaired(loaded, plan_for(loaded, "mlp"))
    slots = [fit.slot for fit in fits if fit.parameter == "model.layers.0.mlp.experts.down_proj"]
    assert sorted(slots) == [0, 1, 2, 3]
    assert sum(fit.rows for fit in fits if ".0." in fit.parameter) == 2 * IDS.numel()


def test_bias_compensation_moves_the_mean():
    loaded = make("gpt2")
    kept = {"layers.0.mlp": list(range(30))}
    model, _ = repaired(loaded, kept, BiasShift)
    project = loaded.network.transformer.h[0].mlp.c_proj
    lost = observed(loaded.network, "transformer.h.0.mlp.c_proj", IDS)[0][:, 30:].mean(0).float() @ project.weight[30:]
    new = model.transformer.h[0].mlp.c_proj
    torch.testing.assert_close(new.bias, project.bias + lost, rtol=1e-4, atol=1e-4)
    assert torch.equal(new.weight[:30], project.weight[:30])
    assert not bool(new.weight[30:].any())


def test_bias_compensation_needs_a_bias():
    loaded = make("llama-gqa")
    with pytest.raises(UnsupportedModelError, match=r"down_proj.weight' has no bias.*prune.compensate=refit or none"):
        repaired(loaded, {"layers.0.mlp": list(range(30))}, BiasShift)
    # Found before text is written, of experts too, even if their outputs get a bias afterwards.
    for name in ("mixtral", "gpt_oss"):
        graph = make(name).graph
        with pytest.raises(UnsupportedModelError, match=r"experts\.down_proj' has no bias"):
            BiasShift().check(graph, graph.of_kinds(["mlp"]))
        BiasShift().check(graph, graph.of_kinds(["expert"]))


def test_mix_moves_the_target_towards_the_dense_hidden_states():
    """Where layer 0 lost a unit and layer 1 another: without mix, layer 1 keeps what it computes from its own input."""
    loaded = make("llama-gqa")
    kept = {f"layers.{n}.mlp": list(range(30)) for n in (0, 1)}
    downs = [repaired(loaded, kept, Refit(mix=mix))[0].model.layers for mix in (0, 0.5, 1)]
    first, second = ([layers[n].mlp.down_proj.weight for layers in downs] for n in (0, 1))
    assert torch.equal(first[0], first[1]) and torch.equal(first[1], first[2])
    assert Refit().settings.mix == 0.5
    without, half, whole = (float((weight - second[0]).detach().norm()) for weight in second)
    assert without == 0 < half < whole


def problem(rows: int = 400, noise: float = 0.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    true = torch.randn(3, 6, generator=generator)
    return x, x @ true.T + noise * torch.randn(rows, 3, generator=generator), true


def fitter_of(old: torch.Tensor) -> WeightFitter:
    reader = Reader("weight", 1, torch.arange(old.shape[1]), False, tuple(old.shape))
    return WeightFitter(reader, old.clone(), None)


def add(fitter, inputs, target):
    fitter.add(SimpleNamespace(inputs=inputs), target)


def solve(fitter):
    fit = fitter.write(("weight", None), [fitter.error(trial) for trial in range(fitter.trials)])
    return fitter.matrix, fit


def test_the_ridge_is_chosen_on_rows_that_were_held_out():
    """Few rows and much noise: a free fit is worse than staying near the old weights, which are true."""
    x, target, true = problem(rows=16, noise=20.0)
    fitter = fitter_of(true)
    add(fitter, x, target)
    new, fit = solve(fitter)
    free = torch.linalg.lstsq(x, target).solution.T
    assert fit.ridge is None or fit.ridge >= 0.1
    assert float((new - true).norm()) < 0.5 * float((free - true).norm())


@pytest.mark.parametrize(("outputs", "step"), [(2, 2), (512, 1)])
def test_errors_are_those_of_evenly_spaced_outputs_where_there_are_many(outputs, step, monkeypatch):
    monkeypatch.setattr(least_squares, "_OUTPUTS", outputs)
    x, target, old = torch.randn(64, 6), torch.randn(64, 5), torch.randn(5, 6)
    fitter = fitter_of(old)
    add(fitter, x, target)
    held_x, held = x[-8:], target[-8:, ::step]
    expected = ((held_x @ old[::step].T - held).square().sum() - held.square().sum()) / 8
    assert fitter.error(fitter.trials - 1) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("noise", [0.01, 1.0, 20.0, 300.0])
def test_the_search_ends_at_the_best_ridge_and_leaves_others_out(noise, monkeypatch):
    x, target, true = problem(rows=64, noise=noise)
    fitter, tried = fitter_of(true + 0.3), []
    add(fitter, x, target)
    every = [fitter.error(trial) for trial in range(fitter.trials)]
    error = WeightFitter.error
    monkeypatch.setattr(WeightFitter, "error", lambda self, trial: tried.append(trial) or error(self, trial))
    (fit,) = write_all({("weight", None): fitter}, SINGLE)
    best = min(range(fitter.trials), key=every.__getitem__)
    assert fit.ridge == (None if best == fitter.trials - 1 else least_squares.RIDGES[best])
    assert len(tried) == len(set(tried)) < fitter.trials or best in (0, len(least_squares.RIDGES) - 1)


@pytest.mark.parametrize("size", [1, 1000], ids=["alike", "with massive activations"])
def test_sums_in_bfloat16_hardly_change_the_error(size, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, true = (torch.randn(shape, generator=generator) for shape in ((512, 32), (3, 32)))
    target = x @ true.T + torch.randn(512, 3, generator=generator)
    massive, errors = torch.arange(512) % 128 == 0, []
    x[massive], target[massive] = x[massive] * size, target[massive] * size
    x = x.bfloat16()
    for fast in (False, True):
        monkeypatch.setattr(least_squares, "multiplies_bfloat16_fast", lambda _, fast=fast: fast)
        fitter = fitter_of(true + 0.5)
        add(fitter, x, target)
        errors.append(float((x.float() @ solve(fitter)[0].T - target)[~massive].square().sum()))
    assert errors[0] != errors[1] == pytest.approx(errors[0], rel=0.01)


def test_inputs_that_are_always_zero_keep_their_weights():
    x, target, true = problem()
    x[:, 2] = 0
    fitter = fitter_of(true + 0.5)
    add(fitter, x, target)
    new, _ = solve(fitter)
    torch.testing.assert_close(new[:, 2], true[:, 2] + 0.5)


def test_without_rows_nothing_is_fitted():
    old = torch.randn(3, 6)
    empty = fitter_of(old)
    assert solve(empty)[1].ridge is None
    add(empty, torch.randn(5, 6), torch.randn(5, 3))
    new, fit = solve(empty)
    assert fit.ridge is None, "five rows leave none to choose a ridge by"
    assert torch.equal(new, old)


def test_a_ridge_that_cannot_be_solved_is_not_chosen(monkeypatch):
    """With fewer tokens than channels, float32 sums have negative eigenvalues; the least ridge doesn't lift them."""
    monkeypatch.setattr(least_squares, "RIDGES", (1e-12, 1.0))
    generator = torch.Generator().manual_seed(0)
    x = torch.exp(3 * torch.randn(256, generator=generator)) * torch.randn(64, 1, generator=generator) * 1e4
    target = torch.randn(64, 3, generator=generator)
    fitter = fitter_of(torch.zeros(3, 256))
    add(fitter, x, target)
    assert fitter.error(0) == inf
    assert solve(fitter)[1].ridge in (None, 1.0)


@pytest.mark.parametrize("scale", (3e18, 1e19))
def test_weights_stay_where_no_ridge_can_be_solved(scale, caplog):
    """Squares of so large activations overflow float32."""
    x, target, true = problem()
    weight = torch.nn.Linear(6, 3, bias=False)
    weight.weight.data.copy_(true)
    fitter = WeightFitter(Reader("weight", 1, torch.arange(5), False, (3, 6)), weight.weight.data, None)
    add(fitter, x * scale, target * 1e-3)
    (fit,) = write_all({("weight", None): fitter}, SINGLE)
    assert fit.ridge is None
    json.dumps(asdict(fit), allow_nan=False)  # as the record is written
    torch.testing.assert_close(weight.weight[:, :5], true[:, :5])
    assert "'weight' keeps its weights" in caplog.text
