"""Nemotron-NAS: what its readers compute from the files is what was written, and outputs are equal."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from checkpoint_cases import LLAMA, SIZES, Source, llama_source
from fresh import run_fresh
from llmpruner_nemotron_nas import LayerSizes, NemotronNasExporter, Sizes, multiplier, padded, stated, width_of
from safetensors.torch import load_file
from torch.nn.functional import linear, silu

import llmpruner
from llmpruner import UnsupportedModelError, build_graph
from llmpruner.discovery.oracle import logits
from llmpruner.errors import CheckpointError, ModelError
from llmpruner.exporters import export
from llmpruner.models.family import AutoFamily
from llmpruner.models.surgery import cut_tensors

IDS = torch.tensor([3, 14, 15, 9, 26, 5, 35, 8])


def logits_from_files(folder: Path) -> torch.Tensor:
    """The format's own arithmetic, written out: (T, V)."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    size, heads, hidden = config["head_dim"], config["num_attention_heads"], config["hidden_size"]
    angles = torch.arange(len(IDS))[:, None] / config["rope_theta"] ** (torch.arange(0, size, 2) / size)
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]) * state[f"{name}.weight"]

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    x = state["model.embed_tokens.weight"][IDS]
    for number, block in enumerate(config["block_configs"]):
        path = f"model.layers.{number}"
        kv_heads = heads // block["attention"]["n_heads_in_group"]
        y = norm(x, f"{path}.input_layernorm")
        q, k, v = (
            linear(y, state[f"{path}.self_attn.{m}_proj.weight"]).view(len(IDS), count, size).transpose(0, 1)
            for m, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
        scores = turned(q) @ turned(k).mT / size**0.5
        scores = scores.masked_fill(torch.ones(len(IDS), len(IDS)).triu(1).bool(), -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(IDS), heads * size)
        x = x + linear(mixed, state[f"{path}.self_attn.o_proj.weight"])
        y = norm(x, f"{path}.post_attention_layernorm")
        gate, up, down = (state[f"{path}.mlp.{m}_proj.weight"] for m in ("gate", "up", "down"))
        assert len(gate) == width_of(block["ffn"]["ffn_mult"], hidden)
        x = x + linear(silu(linear(y, gate)) * linear(y, up), down)
    head = state["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return linear(norm(x, "model.norm"), head)


@pytest.mark.parametrize("name", LLAMA)
def test_the_files_give_the_outputs_of_the_model(name, tmp_path):
    source = llama_source(name)
    line = export(tmp_path, NemotronNasExporter(), tmp_path / "out", source.load)
    assert torch.allclose(logits_from_files(tmp_path / "out"), logits(source.network, IDS[None])[0], atol=1e-5)
    before = sum(p.numel() for p in source.network.parameters())
    after = sum(t.numel() for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert f"padded with zeros from {before:,} to {after:,} parameters" in line
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["DeciLMForCausalLM"], "nemotron-nas")
    assert {"no_op", "ffn_mult"} == set(config["block_configs"][0]["ffn"]), "mlx-lm refuses other names"


@pytest.mark.parametrize("trust", [False, True])
def test_what_is_for_other_programs_is_not_opened(trust, tmp_path):
    """Its code has no model class, so that leave to run it would not help."""
    task = tmp_path / "served"
    export(tmp_path / "pruned", NemotronNasExporter(), task, llama_source("gqa").load)
    written = rf"'{task}' is an export in the format nemotron-nas, .* exported from, '{tmp_path / 'pruned'}'$"
    for opened in (llmpruner.load, llmpruner.discover):
        with pytest.raises(ModelError, match=written):
            opened(task, trust_remote_code=trust)


FRESH = """
import sys
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
print([block.attention.n_heads_in_group for block in config.block_configs], hasattr(config.block_configs[0].ffn, "no"))
config.save_pretrained(sys.argv[2])
"""


@pytest.mark.slow
def test_the_configuration_is_read_in_a_fresh_process(tmp_path):
    export(tmp_path, NemotronNasExporter(), tmp_path / "out", llama_source("gqa").load)
    done = run_fresh(FRESH, tmp_path / "out", tmp_path / "again", folder=tmp_path, timeout=120)
    assert done.stdout.split("\n")[0] == "[4, 2, 2] False", done.stderr[-2000:]
    first, again = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("out", "again"))
    assert first["block_configs"] == again["block_configs"]


def test_every_width_is_read_as_it_was_written():
    for hidden in (*range(64, 1024, 24), 2048, 3072, 4096, 5120, 8192):
        for width in range(256, 40960, 256):
            assert width_of(multiplier(width, hidden), hidden) == width


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), [
    ([(3, 3), (3, 3)], 9, [3, 3]),
    ([(3, 3), (1, 3)], 9, [3, 1]),
    ([(3, 3), (2, 3)], 9, [3, 3]),  # 2 does not divide 9
    ([(8, 4), (5, 4), (4, 4), (3, 4)], 32, [8, 8, 4, 4]),
    ([(2, 3), (2, 2)], 6, [2, 2]),
    ([(2, 3), (1, 2)], 6, [2, 1]),
    ([(4, 1), (3, 2)], 6, [6, 3]),  # as few weights as 8 query and 4 key/value heads in both, and fewer heads
])  # fmt: skip
def test_the_smallest_heads_that_the_format_can_state(layers, heads, kv_heads):
    found = stated(Sizes(64, 8, tuple(LayerSizes(100, *each) for each in layers)))
    assert (found.heads, [layer.kv_heads for layer in found.layers]) == (heads, kv_heads)
    for layer, (kv, queries) in zip(found.layers, layers, strict=True):
        assert layer.width == 256 and layer.kv_heads >= kv and layer.queries >= queries
        assert layer.kv_heads * layer.queries == heads


def test_equal_heads_are_for_sglang(tmp_path):
    source = llama_source("gqa")
    line = export(tmp_path, NemotronNasExporter(), tmp_path / "free", source.load)
    assert ", and mlx-lm reads it;" in line
    line = export(tmp_path, NemotronNasExporter(equal_heads=True), tmp_path / "equal", source.load)
    assert ", and SGLang and mlx-lm read it;" in line
    config = json.loads((tmp_path / "equal" / "config.json").read_text())
    assert {block["attention"]["n_heads_in_group"] for block in config["block_configs"]} == {2}
    assert torch.allclose(logits_from_files(tmp_path / "equal"), logits(source.network, IDS[None])[0], atol=1e-5)


def source_of(name: str, **options: Any) -> Source:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(copy.deepcopy(config)).eval()
    return Source(model, AutoFamily(), config)


@pytest.mark.parametrize(("name", "options", "reason"), [
    ("Qwen2", {}, r"Qwen2ForCausalLM \(model type 'qwen2'\) computes others; prune with --shape uniform"),
    ("Llama", {"mlp_bias": True}, r"no biases, and the model has 'model\.layers\.0\.mlp\.gate_proj\.bias'"),
    ("Mistral", {"sliding_window": 4}, "no sliding window"),
    ("Llama", {"hidden_act": "gelu"}, "computes silu, and the model 'gelu'"),
])  # fmt: skip
def test_what_the_format_cannot_state_is_refused_with_the_reason(name, options, reason, tmp_path):
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        export(tmp_path, NemotronNasExporter(), tmp_path / "out", source_of(name, **options).load)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_groups_that_were_discovered_are_padded_too(tmp_path):
    source, kept = source_of("Mistral", sliding_window=None), {"layers.0.attention": [1], "layers.1.mlp": range(17)}
    # As many query heads to a key/value head as before.
    cut_tensors(source.network, build_graph(source.family, source.config), kept)
    cut_source = replace(source, plans=[SimpleNamespace(kept=kept)])
    export(tmp_path, NemotronNasExporter(), tmp_path / "out", cut_source.load)
    assert torch.allclose(logits_from_files(tmp_path / "out"), logits(source.network, IDS[None])[0], atol=1e-5)


def test_a_wrong_weight_is_found(tmp_path, monkeypatch):
    def wrong(*arguments):
        state = padded(*arguments)
        state["model.layers.1.mlp.down_proj.weight"] = state["model.layers.1.mlp.down_proj.weight"] + 0.1
        return state

    monkeypatch.setattr("llmpruner_nemotron_nas.padded", wrong)
    with pytest.raises(CheckpointError, match="gives other outputs than the model"):
        export(tmp_path, NemotronNasExporter(), tmp_path / "out", llama_source("gqa").load)
    assert not list(tmp_path.iterdir())
