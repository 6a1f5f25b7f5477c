"""``config.json`` has names of transformers 5, and those of readers before it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_cases import INPUT_IDS, SIZES
from transformers import AutoModelForCausalLM

from llmpruner import save_checkpoint
from llmpruner.discovery.oracle import logits

DEFAULT = {"rope_type": "default", "rope_theta": 5e5}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}


def saved(folder: Path, prefix: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A model of the class that begins with ``prefix``, and what its checkpoint's configuration states."""
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **copy.deepcopy(changes)})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    assert save_checkpoint(model, folder, record={}) == "stock"
    return model, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("rope", [DEFAULT, LLAMA3], ids=["default", "llama3"])
def test_rotary_embedding(rope: dict[str, Any], tmp_path: Path) -> None:
    model, config = saved(tmp_path / "out", "Llama", rope_parameters=rope)
    assert config["rope_theta"] == 5e5
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    assert config.get("rope_scaling") == (None if rope is DEFAULT else scaling)
    assert config["rope_parameters"] == rope

    # What programs before transformers 5 wrote has these names alone.
    del config["rope_parameters"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.rope_parameters == rope
    torch.testing.assert_close(logits(loaded, INPUT_IDS), logits(model, INPUT_IDS))


def test_part_of_a_head(tmp_path: Path) -> None:
    _, config = saved(tmp_path / "out", "GPTNeoX", rope_parameters=PARTIAL)
    assert (config["rope_theta"], config["partial_rotary_factor"]) == (2e4, 0.5)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.rope_parameters == PARTIAL


def test_experts(tmp_path: Path) -> None:
    sizes = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    _, config = saved(tmp_path / "out", "Qwen3Moe", **sizes)
    assert config["num_experts"] == 3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_experts == 3
