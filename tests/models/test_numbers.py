"""No score and no weight becomes NaN: in any dtype, for inputs without variation."""

import pytest
import torch
from criteria_cases import SMALL, opened, tokens
from transformers import CONFIG_MAPPING

from llmpruner import Compensation, ImportanceCriterion, load_catalog
from llmpruner.discovery.opening import family_for
from llmpruner.discovery.tiny import random_instance
from llmpruner.engine.walk import CalibrationSet
from llmpruner.models.numbers import first_not_finite
from llmpruner.pruning.compensation.base import RepairTask
from llmpruner.pruning.criteria.estimate import estimate

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
