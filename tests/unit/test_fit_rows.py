"""Rows of fits: sources that are held out in turn, and weights of tokens."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from criteria_cases import make, tokens

from llmpruner import UnsupportedModelError
from llmpruner.calibration.calibration import CalibrationSet
from llmpruner.engine.execution import Execution
from llmpruner.engine.products import WatchProducts
from llmpruner.engine.statistics import divergences
from llmpruner.engine.walk import Batch
from llmpruner.errors import SettingsError
from llmpruner.models.surgery import silence
from llmpruner.pruning.compensation import rows as rows_module
from llmpruner.pruning.compensation.base import RepairTask, fits_record
from llmpruner.pruning.compensation.choose import Chooser
from llmpruner.pruning.compensation.least_squares import MIXES, RIDGES, NormalEquations
from llmpruner.pruning.compensation.refit import Refit
from llmpruner.pruning.compensation.rows import ALIKE, CalibrationRows, Rows
from llmpruner.pruning.compensation.token_weights import LARGEST, normalized, token_weights
from llmpruner.pruning.criteria.activation import OutputEnergy

pytestmark = pytest.mark.usefixtures("full_precision")

CALIBRATION = tokens(24, 16, seed=0)
TWO_SOURCES = replace(CALIBRATION, parts=(0, 1) * 12)


def repaired(loaded, kept, calibration, **settings: Any):
    model = copy.deepcopy(loaded.model)
    return model, Refit(**settings).repair(RepairTask(model, loaded.graph, kept, calibration)).fits


def two_texts(rows: int = 64):
    """Inputs and targets of two sources, which have opposite weights for the last two inputs, and one old weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * rows, 6, generator=generator)
    true = torch.randn(3, 6, generator=generator)
    second = torch.arange(2 * rows) >= rows
    target = x @ true.T
    only = torch.where(second[:, None], -1.0, 1.0) * 3 * x[:, 4:].sum(1, keepdim=True)
    return x, target + only, true, second


def test_a_fit_of_one_source_alone_is_not_used():
    x, target, old, second = two_texts()
    alone = NormalEquations(6, 3, x.device)
    alone.add(x[~second], target[~second])
    assert alone.solve(old)[1] is not None, "on the first source, the fit is better"
    both = NormalEquations(6, 3, x.device)
    both.add(x, target, Rows(second=second))
    errors = [both.error(trial, old) for trial in range(both.trials)]
    assert both.rows == len(x)
    assert both.solve(old, errors)[1] is None, "on the other source, it is worse"
    before, after = both.shares(errors)
    assert before == after > 0.1


def test_each_source_is_held_out_while_the_other_is_fitted():
    x, target, old, second = two_texts()
    equations = NormalEquations(6, 3, x.device)
    equations.add(x, target, Rows(second=second))
    found = []
    for held in (second, ~second):
        gram = (x[~held].T @ x[~held]).double()
        strength = RIDGES[3] * float(gram.diagonal().mean())
        right = (x[~held].T @ target[~held]).double() + strength * old.T.double()
        weight = torch.linalg.solve(gram + strength * torch.eye(6, dtype=torch.float64), right)
        share = (x[held].double() @ weight - target[held]).square().sum() / target[held].square().sum()
        found.append(float(share) - 1)
    assert equations.error(3, old) == pytest.approx(sum(found) / 2, rel=1e-4)


def test_a_weight_counts_as_so_many_rows():
    x, target, old, _ = two_texts(rows=16)
    twice, weighted = NormalEquations(6, 3, x.device), NormalEquations(6, 3, x.device)
    # The last eighth of each call is held out.
    for part, wanted in zip(x.split(8), target.split(8), strict=True):
        twice.add(part.repeat_interleave(2, 0), wanted.repeat_interleave(2, 0))
        weighted.add(part, wanted, Rows(weights=torch.full((8,), 2.0)))
    assert weighted.rows == len(x)
    torch.testing.assert_close(weighted.solve(old)[0], twice.solve(old)[0])


def test_the_target_is_chosen_on_rows_that_are_held_out():
    """D is right on the first source and wrong on the second; with one source, all of it is taken."""
    x, _, old, second = two_texts()
    generator = torch.Generator().manual_seed(2)
    target, more = x @ old.T, x @ torch.randn(3, 6, generator=generator).T
    toward = torch.where(second[:, None], -0.3 * more, more)
    alone = NormalEquations(6, 3, x.device, mixed=True)
    alone.add(x[~second], target[~second], toward=toward[~second])
    new, ridge, mix = alone.solve(old)
    assert (ridge, mix) == (RIDGES[0], 1.0)
    torch.testing.assert_close(x[~second] @ new.T, (target + toward)[~second], rtol=0.05, atol=0.05)
    both = NormalEquations(6, 3, x.device, mixed=True)
    both.add(x, target, Rows(second=second), toward)
    assert both.solve(old)[2] in (None, 0.0, 0.25)


def test_a_trial_has_the_error_of_the_best_share():
    """Here, half: on the rows that are held out, D is half of what it is on the others."""
    x, _, old, _ = two_texts()
    split = len(x) - len(x) // 8
    target, toward = x @ old.T, x @ torch.randn(3, 6, generator=torch.Generator().manual_seed(3)).T
    toward[split:] *= 0.5
    equations = NormalEquations(6, 3, x.device, mixed=True)
    equations.add(x, target, toward=toward)
    used, held = x[:split].double(), x[split:].double()
    strength = RIDGES[2] * float((used.T @ used).diagonal().mean())
    gram = used.T @ used + strength * torch.eye(6, dtype=torch.float64)
    whole, errors = (target + toward)[split:].double(), []
    for share in MIXES:
        right = used.T @ (target + share * toward)[:split].double() + strength * old.T.double()
        fit = torch.linalg.solve(gram, right)
        errors.append(float(((held @ fit - whole).square().sum() - whole.square().sum()) / len(held)))
    assert equations.error(2, old) == pytest.approx(min(errors), rel=1e-4)
    assert errors.index(min(errors)) == MIXES.index(0.5)
    assert equations.solve(old)[2] == 0.5


def test_with_a_target_that_is_chosen_shares_are_recorded():
    loaded = make("llama-gqa")
    kept = {f"layers.{number}.mlp": list(range(24)) for number in (0, 1, 2)}
    _, fits = repaired(loaded, kept, TWO_SOURCES, target="held-out", also="attention", held_out="sources")
    assert {fit.mix for fit in fits} <= {None, *MIXES} and {fit.mix for fit in fits} != {None}
    assert {record["mix"] for record in fits_record(fits)} == {fit.mix for fit in fits}
    _, plain = repaired(loaded, kept, TWO_SOURCES)
    assert {fit.mix for fit in plain} == {None}
    with pytest.raises(SettingsError, match=r"refit: mix = 1.0 has no effect with target = held-out; leave one out"):
        Refit(mix=1, target="held-out")


def test_with_one_source_nothing_is_asked_of_rows(monkeypatch):
    """Bit for bit as without sources: no product is looked at in another way."""
    monkeypatch.setattr(rows_module, "Routing", None)
    assert ALIKE.weighted(one := torch.randn(3, 2)) is one
    loaded = make("mixtral")
    repaired(loaded, {"layers.1.mlp": list(range(40))}, CALIBRATION)


@pytest.mark.parametrize("name", ["llama-gqa", "mixtral"])
def test_sources_change_what_is_held_out(name):
    loaded = make(name)
    kept = {f"layers.{number}.mlp": list(range(30)) for number in (0, 1, 2)}
    _, fits = repaired(loaded, kept, CALIBRATION)
    _, sided = repaired(loaded, kept, TWO_SOURCES, held_out="sources")
    _, alike = repaired(loaded, kept, TWO_SOURCES)
    assert [fit.after for fit in alike] == [fit.after for fit in fits], "by default, sources make no difference"
    # Tokens of later layers may be routed to other experts.
    assert sum(fit.rows for fit in fits) == sum(fit.rows for fit in sided)
    assert [fit.after for fit in fits] != [fit.after for fit in sided]
    assert any(fit.ridge is not None for fit in sided)


@pytest.mark.parametrize(("name", "weight"), [
    ("llama-gqa", "model.layers.1.mlp.down_proj.weight"), ("mixtral", "model.layers.1.mlp.experts.down_proj"),
])  # fmt: skip
def test_rows_are_those_of_their_tokens(name, weight):
    """Weights and sides are found again from the inputs of the products, which differ from token to token."""
    loaded = make(name)
    given = torch.rand(24, 16)
    rows = CalibrationRows(loaded.model, TWO_SOURCES, given)
    batch = Batch(CALIBRATION.input_ids[4:10], [], first=4)
    inputs: list[torch.Tensor] = []
    found: list[tuple[int | None, torch.Tensor, Rows]] = []
    watch = WatchProducts(loaded.model, (), lambda _: None)
    layer = loaded.model.get_submodule("model.layers.1.mlp")
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    loaded.model.config._experts_implementation_internal = "eager"
    with torch.no_grad(), rows.following(watch, [weight]):
        watch.add([weight], lambda use: found.append((use.slot, use.inputs, rows.of(batch, use))))
        with watch:
            loaded.model(input_ids=batch.input_ids, use_cache=False)
    handle.remove()
    seen = 0
    for slot, used, of_use in found:
        assert of_use.weights is not None and of_use.second is not None
        # Every token has another weight.
        numbers = (of_use.weights[:, None] == given[4:10].flatten()).int().argmax(1)
        assert torch.equal(of_use.second, (4 + numbers // 16) % 2 == 1)
        if slot is None:
            gate, up = layer.gate_proj(inputs[0]), layer.up_proj(inputs[0])
        else:
            gate, up = torch.nn.functional.linear(inputs[0], layer.experts.gate_up_proj[slot]).chunk(2, -1)
        torch.testing.assert_close(used, (torch.nn.functional.silu(gate) * up)[numbers])
        seen += len(used)
    assert seen == 96 * (2 if name == "mixtral" else 1)


def test_rows_without_tokens_cannot_have_weights(monkeypatch):
    loaded = make("llama-gqa")
    monkeypatch.setattr(rows_module, "all_tokens", lambda *_: None)
    kept = {"layers.1.mlp": list(range(30))}
    with pytest.raises(UnsupportedModelError, match=r"rows of '.*\.down_proj\.weight' cannot be assigned"):
        repaired(loaded, kept, CALIBRATION, token_weights="divergence")
    assert repaired(loaded, kept, TWO_SOURCES, held_out="sources")[1], "sources are not needed for a fit"


def test_weights_are_in_proportion_and_have_a_limit():
    divergence = torch.ones(4, 100)
    divergence[0, 0], divergence[0, 1], divergence[0, 2] = 2.0, 1000.0, -1e-9
    weights = normalized(divergence)
    assert float(weights.mean()) == pytest.approx(1)
    assert float(weights[0, 0] / weights[1, 0]) == pytest.approx(2)
    mean = float(divergence.clamp_min(0).mean())
    assert float(weights[0, 1] / weights[1, 0]) == pytest.approx(LARGEST * mean)
    assert float(weights[0, 2]) == 0
    assert torch.equal(normalized(torch.zeros(2, 3)), torch.ones(2, 3))


def test_the_weights_are_the_divergence_of_the_cut(monkeypatch):
    """With a probe that is not fitted, it is the model with the removed units silenced."""
    monkeypatch.setattr("llmpruner.pruning.compensation.token_weights.fitted", _cut_alone)
    for name, kinds in (("llama-gqa", ("mlp", "attention")), ("olmo2", ("attention",)), ("llama-gqa", ("hidden",))):
        loaded = make(name)
        kept = {g.name: list(range(g.units - g.units // 3)) for g in loaded.graph.of_kinds(kinds)}
        task = RepairTask(loaded.model, loaded.graph, kept, CALIBRATION)
        before = copy.deepcopy(loaded.model.state_dict())
        found = token_weights(task, Execution.of(loaded.model, loaded.graph.layers))
        assert all(torch.equal(value, before[key]) for key, value in loaded.model.state_dict().items())
        silent = copy.deepcopy(loaded.model)
        silence(silent, loaded.graph, kept)
        with torch.no_grad():
            ids, both = CALIBRATION.input_ids, (loaded.model, silent)
            wanted, logits = (model(input_ids=ids, use_cache=False).logits for model in both)
        expected = normalized(torch.stack([divergences(*pair) for pair in zip(wanted, logits, strict=True)]))
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def _cut_alone(parameter, consumer, gram):
    del gram
    new = torch.zeros_like(parameter)
    index = consumer.kept
    return new.index_copy_(consumer.axis, index, parameter.index_select(consumer.axis, index))


def test_the_probe_has_the_units_that_are_chosen(monkeypatch):
    loaded = make("llama-gqa")
    kept = {f"layers.{number}.mlp": list(range(30)) for number in (0, 1, 2)}
    used: list[list[int]] = []
    monkeypatch.setattr(
        "llmpruner.pruning.compensation.token_weights.fitted",
        lambda parameter, consumer, gram: (used.append(consumer.kept.tolist()), parameter)[1],
    )
    chooser = Chooser(OutputEnergy())
    task = RepairTask(loaded.model, loaded.graph, kept, CALIBRATION, chooser)
    token_weights(task, Execution.of(loaded.model, loaded.graph.layers))
    chosen = Refit().repair(task).kept
    assert used == [list(chosen[name]) for name in kept] != [list(range(30))] * 3


def test_token_weights_change_the_fit_and_help_where_the_cut_hurts():
    """The error on tokens with large weights falls, at the expense of the others."""
    loaded = make("llama-gqa")
    kept = {f"layers.{number}.mlp": list(range(24)) for number in (0, 1, 2)}
    plain, fits = repaired(loaded, kept, CALIBRATION)
    weighted, again = repaired(loaded, kept, CALIBRATION, token_weights="divergence")
    assert [fit.rows for fit in fits] == [fit.rows for fit in again]
    weights = token_weights(
        RepairTask(loaded.model, loaded.graph, kept, CALIBRATION), Execution.of(loaded.model, loaded.graph.layers)
    )

    def damage(model) -> float:
        with torch.no_grad():
            pair = (m(input_ids=CALIBRATION.input_ids, use_cache=False).logits for m in (loaded.model, model))
            found = torch.stack([divergences(*both) for both in zip(*pair, strict=True)])
        return float((weights * found).mean())

    assert damage(weighted) < damage(plain)


def test_a_calibration_set_remembers_its_parts():
    ids = CALIBRATION.input_ids
    assert CalibrationSet(ids, "x", TWO_SOURCES.parts).first(64).parts == (0, 1, 0, 1)
    assert TWO_SOURCES.fingerprint == CALIBRATION.fingerprint
