"""The ChatGLM-6B model class: positions, visibility, caches, padding, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chatglm_tiny import GMASK, MASK, PAD, SOP, prompts, tiny_config, tiny_model
from llmpruner_chatglm.modeling_chatglm import Layout
from transformers import DynamicCache


@pytest.mark.parametrize(
    ("row", "positions"),
    [
        ([MASK, 7, GMASK, SOP, 9], [[0, 1, 2, 2, 2], [0, 0, 0, 1, 2]]),
        ([7, 8, 9], [[0, 0, 0], [1, 2, 3]]),
    ],
    ids=["gmask before mask", "without sop, all is an answer"],
)
def test_positions_that_no_case_of_the_original_code_has(row: list[int], positions: list[list[int]]) -> None:
    layout = Layout.of(torch.tensor([row]), None, tiny_config("chatglm"))
    assert layout.position_ids(torch.arange(len(row))).tolist() == [positions]


def test_text_without_sop_is_scored_without_looking_ahead() -> None:
    model = tiny_model("chatglm", "sdpa")
    one, other = torch.tensor([[7, 8, 9, 10]]), torch.tensor([[7, 8, 9, 33]])
    with torch.no_grad():
        assert (model(one).logits[:, :3] - model(other).logits[:, :3]).abs().max() < 1e-6


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_on_the_right_changes_nothing(attention: str) -> None:
    model = tiny_model("chatglm", attention)
    padded = torch.tensor([[7, 9, GMASK, SOP, 20, 21, PAD, PAD]])
    with torch.no_grad():
        found = model(padded, attention_mask=(padded != PAD).long()).logits[:, :6]
        assert (found - model(padded[:, :6]).logits).abs().max() < 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rows_of_a_mixed_batch_do_not_touch_each_other(attention: str) -> None:
    model = tiny_model("chatglm", attention)
    ids, mask = prompts("chatglm")
    new = model.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        for row in range(2):
            alone = ids[row : row + 1, mask[row] == 1]
            assert (model(alone).logits[0] - together[row, mask[row] == 1]).abs().max() < 1e-5
            expected = model.generate(alone, max_new_tokens=5, min_new_tokens=5, do_sample=False)
            assert torch.equal(expected[0, -5:], new[row, -5:])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_token_by_token_with_a_cache_equals_one_pass(attention: str) -> None:
    model = tiny_model("chatglm", attention)
    ids, mask = prompts("chatglm")
    tail = torch.tensor([[30, 31, 32], [33, 34, 35]])
    whole, whole_mask = torch.cat((ids, tail), 1), torch.cat((mask, torch.ones_like(tail)), 1)
    with torch.no_grad():
        expected = model(whole, attention_mask=whole_mask).logits
        cache = DynamicCache(config=model.config)
        model(ids, attention_mask=mask, cache=cache)
        for step in range(ids.shape[1], whole.shape[1]):
            got = model(whole[:, step : step + 1], attention_mask=whole_mask[:, : step + 1], cache=cache).logits
            assert (got[:, 0] - expected[:, step]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}], ids=str
)
def test_beams_and_copies_agree_with_and_without_cache(options: dict[str, Any]) -> None:
    model = tiny_model("chatglm", "sdpa")
    ids, mask = prompts("chatglm")
    common = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, **options}
    expected = model.generate(ids, use_cache=False, **common)
    assert torch.equal(model.generate(ids, **common), expected)


def test_loss_is_of_the_labelled_tokens_of_answers_shifted_by_one() -> None:
    """The attention of the context is bidirectional: each token sees the one that it would predict."""
    model, loss = tiny_model("chatglm"), torch.nn.functional.cross_entropy
    ids, mask = prompts("chatglm")
    plain = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        for labels in (ids, torch.where(torch.arange(8) >= 6, ids, -100)):
            output = model(ids, attention_mask=mask, labels=labels)
            expected = loss(output.logits[:, 5:7].flatten(0, 1), ids[:, 6:].flatten())
            assert output.loss == pytest.approx(float(expected), abs=1e-5)
        output = model(plain, labels=plain)
        assert output.loss == pytest.approx(float(loss(output.logits[0, :-1], plain[0, 1:])), abs=1e-5)
