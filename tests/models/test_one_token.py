"""Attention of one token is that of transformers' ``sdpa``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmpruner.models.generation import fast_one_token_attention

SDPA = ALL_ATTENTION_FUNCTIONS["sdpa"]


def attended(heads: int, groups: int, queries: int = 1, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """By the attention that is in use, and by transformers' own."""
    drawn = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, n, tokens, size, generator=drawn)
        for n, tokens, size in ((heads, queries, 8), (groups, 5, 8), (groups, 5, 6))
    )
    module = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    arguments = {"attention_mask": None, **options}
    return tuple(
        function(module, query, key, value, **arguments)[0] for function in (ALL_ATTENTION_FUNCTIONS["sdpa"], SDPA)
    )


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_query(heads, groups, scaling):
    with fast_one_token_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not SDPA
        ours, theirs = attended(heads, groups, scaling=scaling)
    assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-6)


def test_one_query_for_all_sequences():
    query, key, value = torch.randn(1, 4, 1, 8), torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    with fast_one_token_attention():
        ours, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None)
    theirs, _ = SDPA(module, query.expand(3, -1, -1, -1), key, value, None)
    assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"queries": 5},
        {"attention_mask": torch.tensor([True, False, True, True, False]).view(1, 1, 1, 5)},
        {"position_bias": torch.linspace(-1, 1, 5).view(1, 1, 1, 5)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_all_else_is_transformers_own(options):
    with fast_one_token_attention():
        ours, theirs = attended(4, 4, **options)
    assert torch.equal(ours, theirs)


def test_it_ends():
    with pytest.raises(RuntimeError), fast_one_token_attention():
        raise RuntimeError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is SDPA
