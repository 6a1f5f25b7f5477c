"""Odd types from pruning to a recovered model, as tiny random instances, which need more than small numbers."""

import json
from collections import Counter
from functools import cache

import pytest
import torch
from fresh import run_fresh
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmpruner import api, load_pruned
from llmpruner.discovery.groups import discover_graph
from llmpruner.discovery.oracle import cached_difference, logits, why_no_generation
from llmpruner.discovery.tiny import random_instance, small_config
from llmpruner.discovery.verify import representative
from llmpruner.errors import UnsupportedModelError
from llmpruner.models.family import AutoFamily
from llmpruner.models.save import save_checkpoint
from llmpruner.structure.scope import Scope
from llmpruner.testing.models import letters

OPTIONS = {
    "falcon, 40B": {
        "new_decoder_architecture": True, "num_attention_heads": 64, "num_kv_heads": 8, "hidden_size": 4096,
    },
    "falcon, multi-head": {"multi_query": False, "bias": True, "parallel_attn": False},
    "bamba": {"attn_layer_indices": [2]},
    "dbrx": {"attn_config": {"rope_theta": 500000.0, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "mamba", "attention"] * 8},
    "lfm2_moe": {"num_hidden_layers": 24, "layer_types": ["conv", "conv", "full_attention"] * 8},
}  # fmt: skip
"""Type, with a name of the variant after a comma → options of its configuration."""
TYPES = (
    *OPTIONS, "gemma4_text", "gemma3n_text", "nemotron", "falcon", "bailing_hybrid", "codegen", "cpmant", "dots3_note",
    "dots3_note_text", "falcon_h1", "gemma4", "gemma4_unified_text", "hrm_text", "kimi_linear", "lara_mini",
    "longcat_flash", "modernbert-decoder", "moshi", "olmo_hybrid", "nemotron_h", "qwen3_5", "qwen3_5_moe",
    "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "xlnet", "zamba", "zamba2",
)  # fmt: skip
LESS = {"bamba": 0.1, "falcon_h1": 0.15}
"""Where channels and heads are less than a fifth of the small instance: the share that is removed."""
REPEATED = ("hrm_text",)
"""Types whose layers are run several times, so that criteria of weights alone can score them."""
SHORT = {("gemma4_text", "llm-pruner"), ("bamba", "llm-pruner"), ("qwen3_5_text", "best")}
CASES = [
    pytest.param(name, method, marks=() if (name, method) in SHORT else pytest.mark.long)
    for name in TYPES
    for method in ("best", "llm-pruner")
]
TOKENS = torch.arange(20, 40).reshape(2, 10)
OTHERS = torch.randint(20, 100, (4, 2, 10), generator=torch.Generator().manual_seed(0))
PROBE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, attn_implementation="eager").eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(20, 40).reshape(2, 10), use_cache=False).logits, sys.argv[2])
"""


def tiny(model_type, **options):
    return random_instance(representative(CONFIG_MAPPING[model_type](**options), AutoFamily())[0])


@pytest.mark.parametrize(("name", "method"), CASES)
def test_prune_save_load_generate_recover(name, method, tmp_path):
    model_type = name.partition(",")[0]
    dense = tiny(model_type, **OPTIONS.get(name, {}))
    dense.save_pretrained(tmp_path / "dense")
    letters().save_pretrained(tmp_path / "dense")
    cut = {"ratio": LESS.get(name, 0.2), "kinds": "mlp,attention", "output": tmp_path / "pruned", "method": method}
    how = {**cut, "calibration": "self", "samples": 4, "length": 16}
    if name in REPEATED:
        with pytest.raises(UnsupportedModelError, match=r"use --importance l1, l2 or random and --set prune"):
            api.prune(str(tmp_path / "dense"), **how)
        how = {**cut, "importance": "l1", "compensate": "none"}
    pruned = api.prune(str(tmp_path / "dense"), **how)
    expected = logits(pruned.network, TOKENS)
    assert expected.isfinite().all() and pruned.network.num_parameters() < dense.num_parameters()

    loaded = load_pruned(tmp_path / "pruned", attn_implementation="eager")
    assert torch.allclose(logits(loaded, TOKENS), expected, atol=1e-4)
    if not (differs := why_no_generation(dense, TOKENS)):
        # An indexer that picks two of the tokens meets equal scores (zeros) in some texts; a cache changes its pick.
        texts = OTHERS if name.startswith("dots3_note") else [TOKENS]
        assert min(cached_difference(loaded, tokens) for tokens in texts) < 2e-4, differs
    found = run_fresh(PROBE, tmp_path / "pruned", tmp_path / "logits.pt")
    assert found.returncode == 0, found.stderr
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=1e-4)

    rows = [{"instruction": "a b c", "output": "d e f"}, {"instruction": "g", "output": "h i"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    recovered = api.recover(
        str(tmp_path / "pruned"), output=tmp_path / "recovered", data=str(tmp_path / "rows.json"), strategy="full",
        max_steps=1, batch_size=2, learning_rate=1e-3,
    )  # fmt: skip
    again = load_pruned(tmp_path / "recovered", attn_implementation="eager")
    assert not torch.equal(logits(again, TOKENS), logits(loaded, TOKENS))
    assert torch.allclose(logits(again, TOKENS), logits(recovered.network, TOKENS), atol=1e-4)


@cache
def small_of(model_type):
    return small_config(CONFIG_MAPPING[model_type]())


def test_sizes_of_single_layers_stay_different_when_a_configuration_is_made_small():
    config = CONFIG_MAPPING["gemma4_text"](attention_k_eq_v=True, num_global_key_value_heads=2)
    small = small_config(config)
    sizes = {kind: small.per_layer_config[kind] for kind in small.layer_types}
    assert {kind: c.head_dim for kind, c in sizes.items()} == {"sliding_attention": 16, "full_attention": 32}
    assert {kind: c.num_key_value_heads for kind, c in sizes.items()} == {"sliding_attention": 3, "full_attention": 2}


@pytest.mark.parametrize(
    "model_type",
    ["dots3_note", "dory", "falcon_h1", "hrm_text", "mamba2", "nemotron", "rwkv", "xlnet", "xlstm", "zamba", "zamba2"],
)
def test_numbers_that_depend_on_each_other_are_made_small_together(model_type):
    """Without a sum, a product, a number of heads, a width of another part that must hold, or two layers that share
    weights, none of these can be built or run."""
    assert random_instance(small_of(model_type)).num_parameters() < 3_000_000


def test_heads_of_a_further_kind_of_layer_divide_no_other_size():
    small = small_of("qwen3_next")
    assert (small.linear_num_key_heads, small.linear_num_value_heads) == (3, 6)
    assert all(
        size % 3 for size in (small.linear_key_head_dim, small.linear_value_head_dim, small.linear_conv_kernel_dim)
    )


def test_heads_of_all_layers_and_of_state_spaces_are_told_from_channels():
    """The heads of cpmant share a table of biases; those of falcon_h1 are no channels of an MLP, and no attention."""
    shared, mixed = (discover_graph(small_of(name)) for name in ("cpmant", "falcon_h1"))
    assert [(g.layer, g.units) for g in shared.of_kinds(["attention"])] == [(None, 5)]
    assert [(g.layer, g.units) for g in shared.of_kinds(["hidden"])] == [(None, 80)]
    assert [(g.name, g.units) for g in mixed.groups if g.layer == 0] == [
        ("layers.0.attention", 3), ("layers.0.mlp", 40), ("layers.0.query", 6), ("layers.0.latent", 12),
    ]  # fmt: skip


@pytest.mark.long
def test_every_layer_is_found_where_a_layer_counts_as_two():
    graph = discover_graph(small_of("longcat_flash"))
    assert Counter(g.layer for g in graph.groups if g.layer is not None) == dict.fromkeys(range(3), 9)


@pytest.mark.parametrize(
    ("model_type", "size"),
    [("bart", "decoder_ffn_dim"), ("falcon", "ffn_hidden_size"), ("gpt2", "n_inner"), ("opt", "ffn_dim")],
)
def test_the_width_has_another_name(model_type, size, tmp_path):
    tiny(model_type).save_pretrained(tmp_path / "dense")
    pruned = api.prune(
        tmp_path / "dense", kinds="mlp", unit_ratio=0.3, importance="l2", compensate="none",
        method="llm-pruner", shape="uniform",
    )  # fmt: skip
    assert api.save(pruned, tmp_path / "pruned") == "stock"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", attn_implementation="eager")
    assert type(loaded).__module__.startswith("transformers.")
    assert getattr(loaded.config, size) == pruned.graph.of_kinds(["mlp"])[0].units
    assert torch.allclose(logits(loaded.eval(), TOKENS), logits(pruned.network, TOKENS), atol=1e-5)


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_layers_that_are_counted_in_a_table_outside_them_are_not_offered(model_type):
    """Embeddings for each layer are in one table, which a cut of layers does not follow."""
    graph = discover_graph(small_of(model_type))
    assert not list(graph.of_kinds(["layer"]))
    reason = "'model.embed_tokens_per_layer.weight' has a part for every layer, which does not follow"
    assert ("model.layers", 0, reason) in {(b.parameter, b.axis, b.reason) for b in graph.blocked}
    with pytest.raises(UnsupportedModelError, match=f"^this model has no layer units .*could not follow .*: {reason}"):
        Scope(("layer",), (0, 1)).groups(graph)
    if model_type == "gemma3n_text":  # token ids choose rows of several tables
        with pytest.raises(UnsupportedModelError, match=r"embed_tokens.* axis 0: token ids are read by ge in model"):
            Scope(("vocabulary",), (0,)).groups(graph)


def test_a_cut_model_that_cannot_run_is_not_saved(tmp_path):
    model = tiny("llama")
    norm = model.model.norm
    norm.weight = torch.nn.Parameter(norm.weight[:-1].detach())
    with pytest.raises(UnsupportedModelError, match=r"^the cut model cannot run: in model.norm, `.*` needs a size"):
        save_checkpoint(model, tmp_path / "pruned", record=None)
    assert not (tmp_path / "pruned").exists()
