"""Models that read only so many tokens are known, and asking for more is refused before weights are read."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from transformers import MptConfig, MptForCausalLM, OPTConfig, OPTForCausalLM

import llmpruner
from llmpruner import DataError
from llmpruner.models.positions import positions_of, table_of

MPT = {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32}
OPT = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
    "word_embed_proj_dim": 32, "max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "gpt2": tiny_models.gpt2,
    "mpt": lambda: MptForCausalLM(MptConfig(**MPT)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]().eval()


def test_as_many_tokens_as_the_model_reads(model):
    assert positions_of(model.config) == table_of(model.config) == 32
    ids = torch.arange(10, 43)[None]
    model(ids[:, :32], use_cache=False)
    with pytest.raises((RuntimeError, IndexError)):
        model(ids, use_cache=False)


def test_a_rotary_model_reads_more():
    model = tiny_models.llama()
    assert positions_of(model.config) == 512 and table_of(model.config) is None


def test_more_is_refused_before_weights_are_read(model, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "out"
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": tiny_models.TEXT}) + "\n")
    with pytest.raises(DataError, match="calibration length 33 is beyond the model's 32 positions; lower --set"):
        llmpruner.prune(folder, ratio=0.2, importance="l1", compensate="refit", samples=4, length=33, output=out)
    with pytest.raises(DataError, match=r"windows of 33 tokens are beyond the 32 positions of '.*model'; lower --win"):
        llmpruner.evaluate(folder, perplexity=str(data), window=33)
    assert {file.name for file in tmp_path.iterdir()} == {"model", "data.jsonl"}
