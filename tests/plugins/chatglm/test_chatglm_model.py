"""The ChatGLM-6B model class: positions, visibility, caches, padding, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chatglm_tiny import GMASK, MASK, PAD, SOP, prompts, tiny_config, tiny_model
from llmpruner_chatglm.modeling_chatglm import Layout
from transformers import DynamicCache


def layout(*rows: list[int], mask: list[list[int]] | None = None) -> tuple[list[Any], list[Any]]:
    ids = torch.tensor(rows)
    attention_mask = None if mask is None else torch.tensor(mask)
    found = Layout.of(ids, attention_mask, tiny_config("chatglm"))
    columns = torch.arange(ids.shape[1])
    return found.position_ids(columns).tolist(), found.visible(columns, columns)[:, 0].int().tolist()


def test_positions_and_visibility_of_a_prompt_with_an_answer() -> None:
    positions, visible = layout([7, 8, GMASK, SOP, 9])
    assert positions == [[[0, 1, 2, 2, 2], [0, 0, 0, 1, 2]]]
    assert visible == [[[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]


def test_mask_in_the_middle_and_gmask_before_mask() -> None:
    positions, _ = layout([7, MASK, 8, SOP, 9], [MASK, 7, GMASK, SOP, 9])
    assert positions == [[[0, 1, 2, 1, 1], [0, 0, 0, 1, 2]], [[0, 1, 2, 2, 2], [0, 0, 0, 1, 2]]]


def test_left_padding_moves_columns_but_not_positions() -> None:
    positions, _ = layout([PAD, PAD, 7, GMASK, SOP], mask=[[0, 0, 1, 1, 1]])
    assert positions == [[[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]]


def test_without_sop_everything_is_a_causal_answer() -> None:
    positions, visible = layout([7, 8, 9])
    assert positions == [[[0, 0, 0], [1, 2, 3]]]
    assert visible == [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]


def test_text_without_sop_is_scored_without_looking_ahead() -> None:
    model = tiny_model("chatglm", "sdpa")
    one, other = torch.tensor([[7, 8, 9, 10]]), torch.tensor([[7, 8, 9, 33]])
    with torch.no_grad():
        assert (model(one).logits[:, :3] - model(other).logits[:, :3]).abs().max() < 1e-6


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_on_either_side_changes_nothing(attention: str) -> None:
    model = tiny_model("chatglm", attention)
    row = torch.tensor([[7, 9, GMASK, SOP, 20, 21]])
    left = torch.tensor([[PAD, PAD, PAD, 7, 9, GMASK, SOP, 20, 21]])
    right = torch.tensor([[7, 9, GMASK, SOP, 20, 21, PAD, PAD]])
    with torch.no_grad():
        expected = model(row).logits
        from_left = model(left, attention_mask=(left != PAD).long()).logits[:, 3:]
        from_right = model(right, attention_mask=(right != PAD).long()).logits[:, :6]
    assert (from_left - expected).abs().max() < 1e-5
    assert (from_right - expected).abs().max() < 1e-5


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


def test_loss_is_of_the_labelled_tokens_shifted_by_one() -> None:
    model = tiny_model("chatglm")
    ids, mask = prompts("chatglm")
    labels = torch.where(torch.arange(8) >= 6, ids, -100)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, labels=labels)
        expected = torch.nn.functional.cross_entropy(output.logits[:, 5:7].flatten(0, 1), ids[:, 6:].flatten())
    assert output.loss == pytest.approx(float(expected), abs=1e-5)


def test_the_context_is_not_trained_on() -> None:
    """Its attention is bidirectional: each token sees the one that it would predict."""
    model = tiny_model("chatglm")
    ids, mask = prompts("chatglm")
    answers = torch.where(torch.arange(8) >= 6, ids, -100)
    with torch.no_grad():
        everything = model(ids, attention_mask=mask, labels=ids).loss
        assert everything == model(ids, attention_mask=mask, labels=answers).loss
        plain = torch.tensor([[7, 8, 9, 10]])
        expected = torch.nn.functional.cross_entropy(model(plain).logits[0, :-1], plain[0, 1:])
        assert model(plain, labels=plain).loss == pytest.approx(float(expected), abs=1e-5)
