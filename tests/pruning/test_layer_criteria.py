"""Blocks of layers: the one that changes the hidden states least goes as a whole."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import tiny_models
import torch
from criteria_cases import opened
from llmpruner_llama import LlamaFamily

import llmpruner
from llmpruner import StreamStats
from llmpruner.errors import SelectionError
from llmpruner.models.model import Model
from llmpruner.pruning.criteria.layers import AngularBlock

FIRST, SECOND = 2, 3
"""Two layers that undo one another."""
LITTLE_TEXT = {"samples": 4, "length": 24, "kinds": "layer"}


@pytest.fixture(scope="module")
def planted() -> Model:
    model = tiny_models.llama(layers=6)
    loaded = opened(model, LlamaFamily())
    shift = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for number, sign in ((FIRST, 1), (SECOND, -1)):
            layer = model.model.layers[number]
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.register_forward_hook(lambda _, __, out, sign=sign: out + sign * shift)
    return loaded


def removed(loaded: Model, importance: str, **settings) -> list[int]:
    plan = llmpruner.plan(loaded, importance=importance, **LITTLE_TEXT, **settings)
    return sorted(set(range(6)) - set(plan.cuts["layers"].kept))


def test_a_block_that_changes_nothing_goes_although_its_layers_do(planted):
    """Each of the two alone is the last that other criteria would remove; without both the model is the same."""
    for amount in ({"unit_ratio": 1 / 3}, {"ratio": 1 / 3}):
        assert removed(planted, "angular-block", layers="all", **amount) == [FIRST, SECOND]
        assert not {FIRST, SECOND} & set(removed(planted, "angular", layers="all", **amount))
    ids = torch.arange(3, 23)[None]
    whole = replace(planted, model=copy.deepcopy(planted.model))
    pruned = llmpruner.prune(whole, importance="angular-block", layers="all", unit_ratio=1 / 3, **LITTLE_TEXT)
    with torch.no_grad():
        torch.testing.assert_close(pruned.model(ids).logits, planted.model(ids).logits)


def test_the_block_is_of_layers_that_may_go(planted):
    assert removed(planted, "angular-block", layers="3-5", unit_ratio=2 / 3) in ([3, 4], [4, 5])
    with pytest.raises(SelectionError, match="no 2 successive layers may be removed"):
        removed(planted, "angular-block", layers="0,2,4", unit_ratio=2 / 3)


def test_a_layer_has_the_distance_of_the_best_block_that_it_is_in():
    nan = torch.nan
    angle = torch.tensor([[0.3, 0.1, 0.2, 0.1], [0.4, 0.25, 0.15, nan]])
    one, two = (StreamStats(torch.zeros(4), row.double(), n) for n, row in enumerate(angle, start=1))
    assert AngularBlock().score_layers(one).tolist() == pytest.approx([0.3, 0.1, 0.2, 0.1])
    found = AngularBlock().score_layers(two)
    assert found.tolist() == pytest.approx([0.4, 0.25, 0.15, 0.15])
    found = AngularBlock().score_layers(replace(two, removable=frozenset({0, 1, 2})))
    assert found.tolist() == pytest.approx([0.4, 0.25, 0.25, 2.0])
