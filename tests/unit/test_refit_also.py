"""``refit.also``: weights that lost no inputs are fitted where hidden states before them have changed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from criteria_cases import make, tokens

from llmpruner.errors import SettingsError
from llmpruner.pruning.compensation.base import RepairTask
from llmpruner.pruning.compensation.bias import BiasShift
from llmpruner.pruning.compensation.consumers import intact_readers
from llmpruner.pruning.compensation.refit import Refit

pytestmark = pytest.mark.usefixtures("full_precision")

CALIBRATION = tokens(48, 32, seed=0)
KEPT = {"layers.1.mlp": list(range(20))}
OUT = "model.layers.2.self_attn.o_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def repaired(loaded, kept, calibration=CALIBRATION, **settings):
    model = copy.deepcopy(loaded.model)
    return model, Refit(**settings).repair(RepairTask(model, loaded.graph, kept, calibration)).fits


def changed(model, loaded) -> set[str]:
    return {n for n, p in model.state_dict().items() if not torch.equal(p, loaded.model.state_dict()[n])}


def stream_after(model, layer: int) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=CALIBRATION.input_ids, use_cache=False, output_hidden_states=True).hidden_states[layer]


def test_readers_after_the_first_cut_are_fitted_toward_the_dense_model():
    loaded = make("llama-gqa")
    plain, fits = repaired(loaded, KEPT)
    model, more = repaired(loaded, KEPT, also="attention")
    assert changed(plain, loaded) == {DOWN}
    # Neither layers before the cut, nor attention of its layer, nor the MLP after it.
    assert changed(model, loaded) == {DOWN, OUT}
    assert fits == more[:1]
    fit = more[1]
    assert (fit.parameter, fit.rows) == (OUT, CALIBRATION.input_ids.numel())
    assert fit.ridge is not None and fit.after < fit.before
    wanted, without, with_it = (stream_after(each, 3) for each in (loaded.model, plain, model))
    assert float((with_it - wanted).norm()) < float((without - wanted).norm())


def test_the_fit_has_a_closed_form():
    """The target is y + mix · d, with d the difference of the hidden states after the outputs are added."""
    loaded = make("llama-gqa")
    model, fits = repaired(loaded, KEPT, also="attention", mix=0.5)
    plain, _ = repaired(loaded, KEPT)

    def seen(which) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found: list[torch.Tensor] = []
        layer = which.model.layers[2]
        hooks = [
            layer.register_forward_pre_hook(lambda _, args: found.append(args[0])),
            layer.self_attn.o_proj.register_forward_hook(lambda _, args, out: found.extend((args[0], out))),
        ]
        with torch.no_grad():
            which(input_ids=CALIBRATION.input_ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        hidden, x, y = (each.flatten(0, 1).double() for each in found)
        return hidden, x, y

    # Attention is not the last in its layer: the difference is that before the MLP.
    (h, _, dense), (pruned, x, own) = seen(loaded.model), seen(plain)
    target = own + 0.5 * (h + dense - pruned - own)
    old = loaded.model.get_parameter(OUT).detach().double()
    strength = fits[1].ridge * float((x.T @ x).diagonal().mean())
    right = x.T @ target + strength * old.T
    expected = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1], dtype=torch.float64), right).T
    torch.testing.assert_close(model.get_parameter(OUT).detach().double(), expected, rtol=2e-3, atol=2e-4)


def test_a_layer_whose_output_is_no_sum_is_fitted_toward_its_dense_outputs():
    loaded = make("olmo2")
    model, fits = repaired(loaded, KEPT, also="attention,mlp")
    ends = [f"model.layers.2.{end}.weight" for end in ("self_attn.o_proj", "mlp.down_proj")]
    assert [fit.parameter for fit in fits] == [DOWN, *ends]
    assert changed(model, loaded) == {DOWN, *(fit.parameter for fit in fits[1:] if fit.ridge is not None)} != {DOWN}


def test_a_fit_that_another_source_does_not_confirm_is_not_used():
    """The second source is noise that the cut changes in another way."""
    loaded = make("llama-gqa")
    ids = CALIBRATION.input_ids.clone()
    generator = torch.Generator().manual_seed(1)
    ids[1::2] = torch.randint(3, 96, ids[1::2].shape, generator=generator)[:, :1]
    mixed = replace(CALIBRATION, input_ids=ids)
    alone, _ = repaired(loaded, KEPT, mixed, also="attention")
    _, fits = repaired(loaded, KEPT, replace(mixed, parts=(0, 1) * 24), also="attention")
    assert changed(alone, loaded) == {DOWN, OUT}
    assert fits[1].parameter == OUT and fits[1].before is not None


def test_experts_and_groups_of_the_plan_are_left_out():
    graph = make("mixtral").graph
    names = {group.name for group in graph.of_kinds(("mlp", "attention"))}
    assert set(intact_readers(graph, {}, 2, names)) == {OUT}
    assert intact_readers(graph, {"layers.2.attention": range(3)}, 2, names) == {}


def test_settings_without_effect_are_refused():
    with pytest.raises(SettingsError, match=r"refit: also = 'attention' has no effect with mix = 0; leave one out"):
        Refit(also="attention", mix=0)
    graph = make("llama-gqa").graph
    with pytest.raises(SettingsError, match=r"also = 'hidden' is refused: .* expected of: attention, mlp, query"):
        Refit(also="attention, hidden").changed_groups(graph, {})
    assert Refit(also=[]).changed_groups(graph, KEPT) == ("layers.1.mlp",)
    assert len(Refit(also="attention").changed_groups(graph, KEPT)) == 1 + graph.num_layers
    assert BiasShift().changed_groups(graph, KEPT) == ("layers.1.mlp",)
