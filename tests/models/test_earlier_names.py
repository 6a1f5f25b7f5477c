"""``config.json`` has names of transformers 5, and those of readers before it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import INPUT_IDS, SIZES
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from llmpruner import save_checkpoint

DEFAULT = {"rope_type": "default", "rope_theta": 5e5}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **copy.deepcopy(changes))).eval()


@pytest.mark.parametrize("rope", [DEFAULT, LLAMA3], ids=["default", "llama3"])
def test_rotary_embedding(rope: dict[str, Any], tmp_path: Path) -> None:
    model = llama(rope_parameters=rope)
    assert save_checkpoint(model, tmp_path / "out", record={}) == "stock"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    assert config.get("rope_scaling") == (None if rope is DEFAULT else scaling)
    assert config["rope_parameters"] == rope

    # What programs before transformers 5 wrote has these names alone.
    del config["rope_parameters"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.rope_parameters == rope
    with torch.no_grad():
        torch.testing.assert_close(loaded(INPUT_IDS).logits, model(INPUT_IDS).logits)


def test_part_of_a_head(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    rope = {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=4, rope_parameters=dict(rope))).eval()
    save_checkpoint(model, tmp_path / "out", record={})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rope_theta"], config["partial_rotary_factor"]) == (2e4, 0.5)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.rope_parameters == rope


def test_experts(tmp_path: Path) -> None:
    sizes = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    save_checkpoint(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes)).eval(), tmp_path / "out", record={})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts"] == 3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_experts == 3
