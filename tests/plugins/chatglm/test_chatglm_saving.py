"""Pruned ChatGLM checkpoints in a fresh process, with llmpruner and without."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_tiny import prompts, tiny_model
from fresh import run_fresh
from llmpruner_chatglm import ChatGLMFamily, GlmFamily
from safetensors.torch import load_file, save_file

from llmpruner import build_graph, load_pruned, save_checkpoint
from llmpruner.models.surgery import cut

pytestmark = pytest.mark.slow

# `llmpruner` cannot be imported in the process that runs this, nor can any plugin.
STRANGER = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("llmpruner"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, inputs, outputs, resaved = sys.argv[1:5]
given = load_file(inputs)
for source in (directory, resaved):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).eval()
    if source == directory:
        model.save_pretrained(resaved)
ids, mask = given["ids"], given["mask"]
with torch.no_grad():
    logits = model(ids, attention_mask=mask).logits
results = {"logits": logits}
for cache in ("dynamic", "static"):
    results[cache] = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, cache_implementation=cache
    )
if len(sys.argv) > 5:
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    results["tokens"] = torch.tensor(tokenizer(sys.argv[5])["input_ids"])
save_file({k: v.contiguous() for k, v in results.items()}, outputs)
"""


def without_llmpruner(directory: Path, work: Path, kind: str, *text: str) -> dict[str, torch.Tensor]:
    ids, mask = prompts(kind)
    save_file({"ids": ids, "mask": mask}, work / "inputs.safetensors")
    arguments = [
        str(directory),
        *(str(work / n) for n in ("inputs.safetensors", "outputs.safetensors", "again")),
        *text,
    ]
    # One home for all tests: each has a process of its own, but the one that these are forked from is shared.
    environment = {**os.environ, "HF_HOME": str(work.parent / "home"), "HF_HUB_OFFLINE": "1"}
    result = run_fresh(STRANGER, *arguments, folder=work, environment=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return load_file(work / "outputs.safetensors")


def expect(model: Any, kind: str, results: dict[str, torch.Tensor]) -> None:
    ids, mask = prompts(kind)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    assert (results["logits"] - logits)[mask == 1].abs().max() < 1e-5
    new = model.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(results["dynamic"], new)
    assert torch.equal(results["static"], new)


UNEVEN = {
    "layers.0.mlp": range(0, 48, 2), "layers.1.mlp": range(40), "layers.0.attention": [1, 3],
    "layers.1.attention": [0, 1, 3], "layers": [0, 1],
}  # fmt: skip
EVEN = {f"layers.{n}.{kind}": units for n in range(3) for kind, units in (("mlp", range(32)), ("attention", [0, 2]))}


@pytest.mark.parametrize(("plan", "tied"), [(UNEVEN, True), (EVEN, False)], ids=["uneven, tied", "uniform, untied"])
def test_pruned_chatglm_loads_without_llmpruner(plan: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    model = tiny_model("chatglm", tie_word_embeddings=tied)
    family = ChatGLMFamily()
    cut(model, build_graph(family, model.config), {k: list(v) for k, v in plan.items()}, family)
    directory = tmp_path / "pruned"
    save_checkpoint(model, directory, record={}, family=family)
    expect(model, "chatglm", without_llmpruner(directory, tmp_path, "chatglm"))
    loaded = load_pruned(directory, attn_implementation="eager")
    assert type(loaded).__module__.startswith("llmpruner")
    ids, mask = prompts("chatglm")
    with torch.no_grad():
        difference = loaded(ids, attention_mask=mask).logits - model(ids, attention_mask=mask).logits
    assert difference[mask == 1].abs().max() == 0


def test_pruned_glm_loads_without_llmpruner(tmp_path: Path) -> None:
    kind = "glm4"
    model = tiny_model(kind)
    family = GlmFamily()
    plan = {"layers.0.mlp": list(range(24)), "layers.1.attention": [0, 3], "layers.2.query": [0, 2, 4, 6]}
    cut(model, build_graph(family, model.config), plan, family)
    assert save_checkpoint(model, tmp_path / "pruned", record={}, family=family) == "shim"
    expect(model, kind, without_llmpruner(tmp_path / "pruned", tmp_path, kind))
