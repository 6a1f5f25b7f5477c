"""Types whose layers are of several kinds, from pruning to a step of recovery, on small instances."""

from __future__ import annotations

import json

import pytest
import torch
from fresh import run_fresh
from transformers import CONFIG_MAPPING

from llmpruner import api
from llmpruner.discovery.oracle import TOLERANCE, cached_difference, distance, logits
from llmpruner.discovery.tiny import random_instance, small_config
from llmpruner.testing.models import letters

LAYER_TYPES = {"lfm2_moe": ["conv", "conv", "full_attention"] * 8}
"""What the default configuration of a type leaves open."""

SHORT = ("qwen3_5_text", "best")
TYPES = (
    "kimi_linear", "lara_mini", "lfm2_moe", "minimax_m2", "olmo_hybrid", "qwen3_5",
    "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "recurrent_gemma",
)  # fmt: skip
KINDS = {"minimax_m2": "query"}
"""What is removed, where not channels and heads."""

TOKENS = torch.arange(20, 33)[None]
PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, attn_implementation="eager").eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.load(sys.argv[2]), use_cache=False).logits, sys.argv[3])
"""


@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        pytest.param(t, m, marks=pytest.mark.slow if (t, m) == SHORT else pytest.mark.long)
        for t in TYPES
        for m in ("best", "llm-pruner")
    ],
)
def test_from_pruning_to_recovery(model_type, method, tmp_path):
    layers = LAYER_TYPES.get(model_type)
    options = {"layer_types": layers, "num_hidden_layers": len(layers)} if layers else {}
    dense = random_instance(small_config(CONFIG_MAPPING[model_type](**options)))
    for folder in (dense, letters()):
        folder.save_pretrained(tmp_path / "dense")

    kinds = KINDS.get(model_type, "mlp,attention")
    little = {"samples": 4, "length": 16, "layers": "all", "ratio": 0.05 if kinds == "query" else 0.2}
    pruned = api.prune(str(tmp_path / "dense"), output=tmp_path / "pruned", method=method, kinds=kinds, **little)
    assert {cut.kind for plan in pruned.plans for cut in plan.cuts.values()} <= set(kinds.split(","))
    assert pruned.graph.decoder_parameters < sum(p.numel() for p in dense.parameters())

    torch.save(TOKENS, tmp_path / "tokens.pt")
    done = run_fresh(PROGRAM, tmp_path / "pruned", tmp_path / "tokens.pt", tmp_path / "logits.pt")
    assert done.returncode == 0, done.stderr
    loaded = api.load(str(tmp_path / "pruned"))
    assert distance(torch.load(tmp_path / "logits.pt"), logits(loaded.model, TOKENS)) <= TOLERANCE
    assert cached_difference(loaded.model, TOKENS) <= TOLERANCE

    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "a b c", "input": "", "output": "d e f g"}] * 2))
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    recovered = api.recover(
        loaded, data=str(tmp_path / "data.json"), work_dir=tmp_path / "work", strategy="full", max_steps=1, batch_size=2
    )
    changed = [n for n, t in recovered.model.state_dict().items() if not torch.equal(t, before[n])]
    assert changed and all(t.isfinite().all() for t in recovered.model.state_dict().values())
