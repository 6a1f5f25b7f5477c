"""Numbers: every method gives what it should for models in 16 bits on a CPU, whose walks have hidden states in float32;
and no score and no weight becomes NaN, also for inputs without variation."""

import copy
from functools import cache

import pytest
import tiny_models
import torch
from criteria_cases import SMALL, correlated, layers_of, make, opened, tokens
from torch import nn
from torch.nn import functional
from transformers import CONFIG_MAPPING

from llmpruner import Compensation, ImportanceCriterion, api, load_catalog
from llmpruner.discovery.opening import family_for
from llmpruner.discovery.oracle import distance, logits, silenced
from llmpruner.discovery.tiny import random_instance
from llmpruner.engine.execution import Execution
from llmpruner.engine.walk import CalibrationSet, ForwardWalk, call_layer
from llmpruner.models.numbers import autocast_to, first_not_finite
from llmpruner.models.opening import load_pruned
from llmpruner.pruning.compensation.base import RepairTask
from llmpruner.pruning.criteria.estimate import estimate
from llmpruner.settings import LoadSettings

TYPES = {
    "starcoder2": SMALL,
    "stablelm": SMALL,
    "gpt_neox": SMALL,
    "falcon": {"num_kv_heads": 3, "new_decoder_architecture": True, "bias": False},
    "opt": {"ffn_dim": 56, "word_embed_proj_dim": 48, "max_position_embeddings": 128},
    "llama": SMALL,
}
"""All but the last have layer norms, of which torch refuses weights in 16 bits for inputs in float32."""
LAYERS_AND_HEADS = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 96}
TOLERANCE = {"bfloat16": 0.06, "float16": 0.01}
"""Largest accepted difference of logits between a cut and a silenced model, relative to the largest one."""
METHODS = {
    "gradients": {"method": "llm-pruner"},
    "refit of weights' choice": {"importance": "l2", "compensate": "refit"},
    "bias": {"importance": "flap", "compensate": "bias"},
    "obs": {"importance": "obs", "compensate": "refit"},
    "measured": {"method": "best", "allocation": "sensitivity", "shape": "free"},
    "layers": {"importance": "block-influence", "kinds": "layer", "ratio": 0.34, "compensate": "none"},
}
TOKENS = torch.arange(20, 40).reshape(2, 10)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    @cache
    def folder(name, dtype):
        path = tmp_path_factory.mktemp(name) / "dense"
        model = correlated(random_instance(CONFIG_MAPPING[name](**LAYERS_AND_HEADS | TYPES[name])))
        model.to(getattr(torch, dtype)).save_pretrained(path)
        return path

    return folder


def prune(model, output, dtype, **settings):
    settings = {"ratio": 0.2, "samples": 4, "length": 16, "calibration": "self", **settings}
    return api.prune(str(model), output=output, load=LoadSettings(dtype=dtype), **settings)


CASES = [("starcoder2", "bfloat16"), ("falcon", "float16"), ("llama", "float16")]
LIKE_OTHERS = [("stablelm", "float16"), ("gpt_neox", "bfloat16"), ("opt", "bfloat16")]


@pytest.mark.parametrize(
    ("name", "dtype"), [*CASES, *(pytest.param(*each, marks=pytest.mark.long) for each in LIKE_OTHERS)]
)
def test_a_cut_model_equals_the_silenced_one(dense, tmp_path, name, dtype):
    folder = dense(name, dtype)
    pruned = prune(folder, tmp_path / "pruned", dtype, method="fast", kinds="mlp,attention")
    found = logits(load_pruned(tmp_path / "pruned"), TOKENS)
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found, logits(pruned.network, TOKENS))
    whole = api.load(str(folder), dtype=dtype)
    before = logits(whole.network, TOKENS)
    with silenced(whole.network, whole.graph, pruned.plans[-1].kept):
        wanted = logits(whole.network, TOKENS)
    assert distance(found.float(), wanted.float()) < TOLERANCE[dtype] < distance(before.float(), wanted.float())


@pytest.mark.parametrize(("name", "dtype"), [("starcoder2", "bfloat16"), ("llama", "float16")])
def test_a_compensated_model_is_nearer_to_the_dense_one(dense, tmp_path, name, dtype):
    folder, far = dense(name, dtype), {}
    one = logits(api.load(str(folder)).network, TOKENS).float().log_softmax(-1)
    for compensation in ("refit", "none"):
        options = {"method": "best", "compensate": compensation, "kinds": "mlp", "samples": 32, "length": 32}
        pruned = prune(folder, tmp_path / compensation, dtype, ratio=0.15, **options)
        other = logits(load_pruned(tmp_path / compensation), TOKENS)
        assert torch.equal(other, logits(pruned.network, TOKENS))
        far[compensation] = float((one.exp() * (one - other.float().log_softmax(-1))).sum(-1).mean())
    assert far["refit"] < far["none"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(dense, tmp_path, method):
    pruned = prune(dense("gpt_neox", "bfloat16"), tmp_path / "pruned", "bfloat16", **METHODS[method])
    found = logits(load_pruned(tmp_path / "pruned"), TOKENS)
    assert bool(found.isfinite().all()) and torch.equal(found, logits(pruned.network, TOKENS))


@pytest.mark.parametrize("method", [{"method": "best"}, {"method": "llm-pruner"}], ids=["best", "gradients"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_that_are_read_layer_by_layer_give_the_same(dense, tmp_path, monkeypatch, method, dtype):
    """Text that the model writes, too."""
    monkeypatch.setattr("llmpruner.models.weights.multiplies_bfloat16_fast", lambda _: True)
    for streamed in (False, True):
        monkeypatch.setattr("llmpruner.pruning.forecast.free_memory", lambda _, s=streamed: 0 if s else 1 << 50)
        prune(dense("starcoder2", dtype), tmp_path / str(streamed), dtype, **method)
    one, other = (load_pruned(tmp_path / str(streamed)).state_dict() for streamed in (False, True))
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_model_that_writes_text_in_bfloat16_has_its_weights_again(monkeypatch):
    model = make("llama-gqa")
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    monkeypatch.setattr("llmpruner.models.weights.multiplies_bfloat16_fast", lambda _: True)
    with pytest.raises(KeyError), model.weights.in_bfloat16():
        assert model.network.dtype == torch.bfloat16
        raise KeyError
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items())


def test_norms_have_weights_in_16_bits_for_inputs_in_another_dtype():
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(8), torch.randn(8)
    for narrow in (torch.bfloat16, torch.float16):
        w, b = weight.to(narrow), bias.to(narrow)
        for inputs in (x, x.bfloat16()):
            with autocast_to("cpu", torch.bfloat16):
                found = functional.layer_norm(inputs, (8,), w, bias=b), functional.group_norm(inputs.mT, 2, w, b)
            wide = w.float(), b.float()
            assert torch.equal(found[0], functional.layer_norm(inputs, (8,), *wide).to(found[0].dtype))
            assert torch.equal(found[1], functional.group_norm(inputs.mT, 2, *wide).to(found[1].dtype))


class OneDtype(nn.Module):
    """Passes on what it gets, and refuses another dtype than that of its weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return torch.zeros_like(self.weight.expand(x.shape)).index_add_(1, torch.arange(x.shape[1]), x)


def test_layers_that_refuse_float32_get_hidden_states_in_their_own_dtype():
    loaded = make("llama-gqa")
    loaded.network.bfloat16()
    layers_of(loaded)[1].input_layernorm = OneDtype(torch.ones(48, dtype=torch.bfloat16))
    calibration = CalibrationSet(tokens(4, 16).input_ids, "steps")
    walk, embedded = ForwardWalk.over(Execution.of(loaded.network, loaded.graph.layers), calibration)
    assert walk.form.autocast is None
    (calls,) = walk.calls
    with torch.no_grad():
        for number, layer in enumerate(walk.layers):
            wanted = call_layer(layer, embedded[0].bfloat16(), copy.deepcopy(calls[number]))
            walk.advance(number, embedded)
            assert embedded[0].dtype == torch.float32 and torch.equal(embedded[0], wanted.float())


@pytest.mark.parametrize(
    ("dense_in", "pruned_in", "form"), [("float32", "bfloat16", "stock"), ("bfloat16", "float32", "shim")]
)
def test_a_pruned_model_is_loaded_in_the_dtype_that_it_is_stored_in(tmp_path, dense_in, pruned_in, form):
    tiny_models.llama().to(getattr(torch, dense_in)).save_pretrained(tmp_path / "dense")
    cut = {"stock": {}, "shim": {"shape": "free", "layers": "0"}}[form]
    made = api.prune(
        str(tmp_path / "dense"), output=tmp_path / "pruned", unit_ratio=0.3, importance="l1",
        load=LoadSettings(dtype=pruned_in), **cut,
    )  # fmt: skip
    assert made.form == form
    found = api.load(tmp_path / "pruned")
    assert found.network.dtype == getattr(torch, pruned_in)
    api.save(found, tmp_path / "saved")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("saved", "pruned"))
    assert one == other
    assert api.load(tmp_path / "pruned", dtype="float16").network.dtype == torch.float16


# No NaN


CATALOG = load_catalog()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TEXT = tokens(4, 16)
ODD = SMALL | {"hidden_size": 36, "intermediate_size": 37, "num_hidden_layers": 2, "head_dim": 6}


def model_of(values=ODD, dtype=torch.float32):
    config = CONFIG_MAPPING["llama"](**values)
    return opened(random_instance(config).to(dtype), family_for(CATALOG, config))


@pytest.fixture(scope="module", params=DTYPES[1:], ids=str)
def models(request):
    """A model in 16 bits, and the same in float32."""
    return model_of(dtype=request.param), model_of()


OF_CHANNELS_OR_LAYERS = sorted(
    name for name, cls in CATALOG[ImportanceCriterion].items() if any(cls().accepts(kind) for kind in ("mlp", "layer"))
)


@pytest.mark.parametrize("name", OF_CHANNELS_OR_LAYERS)
def test_every_criterion_in_16_bits(models, name):
    """Scores are finite, and rank units nearly as in float32."""
    criterion = CATALOG[ImportanceCriterion][name]()
    kind = next(kind for kind in ("mlp", "layer") if criterion.accepts(kind))
    found, exact = (
        estimate(loaded.network, loaded.graph, loaded.graph.of_kinds([kind]), criterion, TEXT) for loaded in models
    )
    for group, scores in found.items():
        assert torch.isfinite(scores).all()
        if len(scores) > 4:
            ranks = torch.stack([values.argsort().argsort().double() for values in (scores, exact[group])])
            assert torch.corrcoef(ranks)[0, 1] > 0.9


@pytest.mark.parametrize("name", ["fisher", "taylor"])
def test_gradients_of_many_tokens_in_float16(name):
    """The gradient of a mean over 1,024 tokens is smaller than what float16 holds; scaled, it is as in float32."""
    values = ODD | {"max_position_embeddings": 512}
    text, criterion = tokens(2, 512), CATALOG[ImportanceCriterion][name]()
    models = [model_of(values=values, dtype=dtype) for dtype in (torch.float16, torch.float32)]
    for loaded in models:
        # As small as gradients are in large models.
        loaded.network.get_output_embeddings().weight.data.mul_(0.01)
    found, exact = (
        estimate(loaded.network, loaded.graph, loaded.graph.of_kinds(["mlp"]), criterion, text) for loaded in models
    )
    for group, scores in found.items():
        torch.testing.assert_close(scores, exact[group], rtol=0.05, atol=0.01 * float(exact[group].mean()))


DEGENERATE = {
    "one token again and again": (CalibrationSet(torch.full((4, 16), 7), "x"), 1.0),
    "one sample of two tokens": (CalibrationSet(torch.tensor([[5, 9]]), "x"), 1.0),
    "inputs near zero": (TEXT, 1e-6),
    "inputs that are zero": (TEXT, 0.0),
}
"""Text, and a factor on the embeddings: Gram matrices are singular, tiny, or zero."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", DEGENERATE)
def test_refits_to_degenerate_inputs(what, dtype):
    (text, factor), loaded = DEGENERATE[what], model_of(dtype=dtype)
    for name, parameter in loaded.network.named_parameters():
        if "up_proj" in name or "v_proj" in name:
            parameter.data.mul_(factor)
    kept = {group.name: range(0, group.units, 2) for group in loaded.graph.of_kinds(["mlp"])}
    with torch.no_grad():
        CATALOG[Compensation]["refit"]().repair(RepairTask(loaded.network, loaded.graph, kept, text))
    assert first_not_finite(loaded.network.named_parameters()) is None
