"""A tokenizer whose padding token was added without resizing the model, as in many derivatives of Llama."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch

import llmpruner
from llmpruner.calibration.written import answered
from llmpruner.models.tokenizer import padding_id, with_padding


@pytest.fixture
def model():
    return tiny_models.llama()


@pytest.fixture
def tokenizer(model):
    tokenizer = tiny_models.tokenizer()
    extra = model.get_input_embeddings().num_embeddings - len(tokenizer)
    tokenizer.add_tokens([f"<extra {n}>" for n in range(extra)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings
    return tokenizer


def test_another_token_pads(model, tokenizer):
    assert padding_id(tokenizer, model) == tokenizer.eos_token_id
    assert padding_id(tokenizer, model, [None, 10**6, 7]) == 7
    other = with_padding(tokenizer, model)
    assert (other.pad_token_id, tokenizer.pad_token) == (tokenizer.eos_token_id, "[PAD]")
    assert with_padding(other, model) is other


def test_recovery(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": "Question", "completion": "It is so. " * (1 + n % 3)} for n in range(8)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    llmpruner.prune(tmp_path / "model", ratio=0.2, importance="l1", compensate="none", output=tmp_path / "pruned")
    llmpruner.recover(
        tmp_path / "pruned", data=str(tmp_path / "d.jsonl"), output=tmp_path / "out", strategy="full", max_steps=3,
        batch_size=4, micro_batch_size=4,
    )  # fmt: skip
    assert llmpruner.load(tmp_path / "out").tokenizer.pad_token == "[PAD]"


def test_what_the_model_writes(model, tokenizer):
    numbers = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    assert len(answered(model, tokenizer, [[5, 6, 7], [8]], 4, numbers)) == 2
