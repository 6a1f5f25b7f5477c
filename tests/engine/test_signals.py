"""The layer-by-layer walk gives what autograd over the whole model gives, and holds one layer's gradients."""

import weakref

import pytest
import torch
from transformers import CONFIG_MAPPING

from llmpruner import ModelError, Signal
from llmpruner.calibration.written import self_generated
from llmpruner.discovery.tiny import random_instance, small_config
from llmpruner.engine.execution import Execution
from llmpruner.engine.statistics import walk_signals
from llmpruner.engine.walk import CalibrationSet
from llmpruner.models.meta import graph_of


def calibrate(loaded, samples=5):
    return CalibrationSet(self_generated(loaded.model, None, samples, 17, 0), "self")


def stored(graph):
    return [name for name in graph.shapes if name not in graph.ties]


def walk(model, graph, calibration, names=None):
    needs = {Signal.WEIGHT, Signal.GRAD, Signal.GRAD_SQ}
    return walk_signals(Execution.of(model, graph.layers), graph, names or stored(graph), needs, calibration, 0, None)


def test_gradients_equal_plain_autograd(loaded):
    assert_autograd(loaded.model, loaded.graph, calibrate(loaded))


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("gemma3n_text", {}), ("gemma4_text", {"num_kv_shared_layers": 4, "attention_k_eq_v": True})],
)
def test_gradients_of_keys_and_values_that_later_layers_use_are_sums(model_type, sizes):
    """These types also compute an input of each layer from embeddings of its own."""
    config = small_config(CONFIG_MAPPING[model_type](**sizes))
    assert "reuse" in config.kv_sharing_modes and config.hidden_size_per_layer_input
    ids = torch.randint(3, config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(0))
    model = random_instance(config)
    assert_autograd(model, graph_of(model, ()), CalibrationSet(ids, "random"))


def assert_autograd(model, graph, calibration):
    """In float64: sums of float32 products round otherwise with another number of threads."""
    model, ids = model.double(), calibration.input_ids
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.float() for name, p in model.named_parameters()}
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in ids:
        model.zero_grad()
        model(row[None], labels=row[None]).loss.backward()
        for name, parameter in model.named_parameters():
            squares[name] += parameter.grad.square() / len(ids)
    model.zero_grad()

    seen = set()
    for name, signals in walk(model, graph, calibration):
        torch.testing.assert_close(
            signals.grad, expected[name], rtol=2e-4, atol=1e-6 * float(expected[name].abs().max())
        )
        torch.testing.assert_close(
            signals.grad_sq, squares[name].float(), rtol=2e-4, atol=1e-6 * float(squares[name].max())
        )
        seen.add(name)
    assert seen == set(stored(graph))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_gradients_of_one_layer_exist_at_a_time(gqa):
    alive = []
    for name, signals in walk(gqa.model, gqa.graph, calibrate(gqa)):
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        alive.append((layer, weakref.ref(signals.grad)))
        layers = {number for number, reference in alive if reference() is not None}
        assert layers == {layer}


def test_protected_layers_are_not_walked(gqa):
    wanted = [n for n in stored(gqa.graph) if n.startswith("model.layers.2.mlp.")]
    differentiated = []
    for layer in gqa.model.model.layers:
        layer.register_forward_hook(lambda _, args, __: differentiated.append(args[0].requires_grad))
    found = [name for name, _ in walk(gqa.model, gqa.graph, calibrate(gqa, 1), wanted)]
    assert sorted(found) == sorted(wanted)
    assert sum(differentiated) == 2, "layers 3 and 2 are walked back, 1 and 0 are not"


def test_damaged_weights_are_named(gqa):
    calibration = calibrate(gqa)
    with torch.no_grad():
        gqa.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="are not finite numbers"):
        list(walk(gqa.model, gqa.graph, calibration))
