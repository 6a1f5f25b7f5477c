"""The mean of a loss over tokens, in blocks: values and gradients of the same loss over all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from llmpruner.recovery import token_loss
from llmpruner.recovery.token_loss import blocks, mean_over_tokens

ROWS = torch.tensor([0, 2, 3, 7, 8])
LABELS = torch.tensor([1, 0, 6, 6, 3])


def term(logits, part):
    return functional.cross_entropy(logits, LABELS[part], reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [7, 14, 1000])
def test_it_is_the_loss_over_all_logits(monkeypatch, dtype, elements):
    monkeypatch.setattr(token_loss, "_ELEMENTS", elements)
    logits = torch.randn(3, 3, 7).to(dtype)
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    wanted = functional.cross_entropy(one.flatten(0, 1)[ROWS].float(), LABELS)
    found = mean_over_tokens(other, ROWS, term)
    torch.testing.assert_close(found, wanted)
    (3 * wanted).backward()
    (3 * found).backward()
    torch.testing.assert_close(other.grad, one.grad)


def test_without_gradients_and_without_rows():
    logits = torch.randn(3, 3, 7)
    with torch.no_grad():
        assert not mean_over_tokens(logits, ROWS, term).requires_grad
    logits.requires_grad_()
    nothing = mean_over_tokens(logits, ROWS[:0], term)
    nothing.backward()
    assert float(nothing) == 0 and not logits.grad.any()


def test_it_computes_in_float32_under_autocast():
    seen = []

    def exact(logits, part):
        seen.append((logits @ logits.T).dtype)
        return logits.sum(-1)

    with torch.autocast("cpu", torch.bfloat16):
        mean_over_tokens(torch.randn(3, 3, 7, dtype=torch.bfloat16), ROWS, exact)
    assert seen == [torch.float32]


def test_blocks_cover_all_tokens():
    assert [(b.start, b.stop) for b in blocks(5, token_loss._ELEMENTS // 2)] == [(0, 2), (2, 4), (4, 5)]
    assert blocks(0, 10) == [] and len(blocks(3, 10 * token_loss._ELEMENTS)) == 3
