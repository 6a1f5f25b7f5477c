"""The oracle on published architectures, none of which has code in discovery: units, tokens, whole layers, images."""

import copy
from functools import cache

import pytest
import torch
from transformers import CONFIG_MAPPING, FalconConfig, FuyuConfig, Gemma3Config

from llmpruner.discovery.follow import Follow, FollowTable
from llmpruner.discovery.groups import discover_graph
from llmpruner.discovery.oracle import VERIFIED, cached_difference, logits
from llmpruner.discovery.tiny import Small, random_instance, tiny_config
from llmpruner.discovery.verify import verify
from llmpruner.models.family import AutoFamily
from llmpruner.models.meta import decoder_layers, graph_of
from llmpruner.models.modeling_llmpruner import drop_layers
from llmpruner.models.opening import load_pruned
from llmpruner.models.save import save_checkpoint
from llmpruner.models.surgery import cut_tensors, silence
from llmpruner.structure.coupling import LAYER

UNITS, TOKENS = ("mlp", "attention"), ("vocabulary",)
REQUIRED = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen3", "gemma", "gemma3_text", "phi3", "glm", "glm4", "gptj", "falcon", "starcoder2",
         "stablelm", "olmo2", "cohere", "smollm3", "qwen3_moe"),
        UNITS,
    ),
    # Tied and untied, with a biased head, scaled embeddings and logits, experts.
    **dict.fromkeys(
        ("qwen2", "gemma2", "phi", "gpt2", "gpt_neox", "opt", "bloom", "granite", "mixtral", "olmoe"), (*UNITS, *TOKENS)
    ),
    # gemma3: the text part of a multimodal type.
    **dict.fromkeys(("cohere2", "gemma3"), TOKENS),
    # Sizes of layers are saved in the convention of transformers.
    "gemma4_text": UNITS,
    # Spreads its heads over four parts: with five heads, no head of the small model is in one part alone.
    "codegen": ("attention",),
}  # fmt: skip
"""Model type → the kinds of units that are verified."""
LIKE = {
    "glm": "glm4", "smollm3": "mistral", "stablelm": "chapter 1 of the tutorial", "gemma4_text": "types end to end",
}  # fmt: skip
"""Model type → where the same is verified."""


@cache
def verdicts(model_type):
    found = verify(AutoFamily(), CONFIG_MAPPING[model_type](), kinds=REQUIRED[model_type])
    return {verdict.kind: verdict for verdict in found}


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=pytest.mark.long) if name in LIKE else name for name in REQUIRED]
)
def test_cuts_of_well_known_types_equal_silencing(model_type):
    found = verdicts(model_type)
    assert {k: v.verdict for k, v in found.items()} == dict.fromkeys(REQUIRED[model_type], VERIFIED), found
    if "vocabulary" in found:
        done = set(found["vocabulary"].checks)
        assert {"uneven eager", "even eager", "cached generation", "save and load"} <= done


def test_attributes_and_tables_that_must_follow_are_found():
    verdict = verdicts("gpt2")["attention"]
    assert verdict.follows == (Follow("attention", "transformer.h.*.attn", "split_size"),)
    assert {"uneven eager", "uneven sdpa", "even sdpa", "cached generation", "save and load"} <= set(verdict.checks)
    tables = {(f.path, f.argument) for f in verdicts("bloom")["attention"].follows if isinstance(f, FollowTable)}
    assert ("transformer.h.*", "alibi") in tables


def test_key_value_heads_are_shrunk_whatever_a_configuration_calls_them():
    config = FalconConfig(new_decoder_architecture=True, hidden_size=4096, num_attention_heads=64, num_kv_heads=8)
    small = tiny_config(config)
    assert (small.num_attention_heads, small.num_kv_heads) == (6, 3)
    (verdict,) = verify(AutoFamily(), config, kinds=["attention"])
    assert (verdict.verdict, verdict.units) == (VERIFIED, 3), verdict.reason


# Layers


TYPES = {
    "afmoe": "the first layers are dense, the others have experts, and a number says how many",
    "bart": "the decoder's layers are counted apart from the encoder's",
    "beam": "each layer states what it is",
    "big_bird": "the class exchanges its attention modules while it runs",
    "falcon_mamba": "there are no attention heads",
    "flint": "a list holds the numbers of the dense layers",
    "gemma3": "the configuration of the text is a part of another",
    "gemma3_text": "rotary tables stay of a layer type of which no layer is left",
    "gpt_neox_japanese": "the last layer has a bias of its own",
    "olmo_hybrid": "the configuration must state a layer of linear attention",
    "qwen3_5_text": "a cache needs an attention layer to count tokens",
}
"""Model type → why its layers were once not removable."""

IDS = torch.randint(40, 128, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_layers_of_every_sort_of_configuration_are_removable(model_type):
    (verdict,) = verify(AutoFamily(), CONFIG_MAPPING[model_type](), kinds=[LAYER])
    assert verdict.verdict == VERIFIED, verdict.reason
    assert "save and load" in verdict.checks


def shortened(kept):
    """A random Jamba that has lost all but the layers ``kept``, of which number 4 alone is attention."""
    model = random_instance(tiny_config(CONFIG_MAPPING["jamba"](), Small((4, 2))))
    drop_layers(model, decoder_layers(model), kept)
    return model


def test_layers_removed_again_from_a_loaded_model(tmp_path):
    """By their period, the types of the layers left would all be 'mamba', with wrong masks and caches."""
    assert save_checkpoint(shortened([0, 2, 3, 4]), tmp_path / "once", record={}) == "shim"
    loaded = load_pruned(tmp_path / "once", attn_implementation="eager")
    assert loaded.config.layers_block_type == ["mamba", "mamba", "mamba", "attention"]

    drop_layers(loaded, "model.layers", [1, 3])
    save_checkpoint(loaded, tmp_path / "twice", record={})
    again = load_pruned(tmp_path / "twice", attn_implementation="eager")
    again.save_pretrained(tmp_path / "plain")
    direct = logits(shortened([2, 4]), IDS)
    assert again.layers_kept["kept"] == [2, 4]
    assert torch.equal(logits(again, IDS), direct)
    assert cached_difference(again, IDS) < 1e-5
    assert torch.equal(logits(load_pruned(tmp_path / "plain", attn_implementation="eager"), IDS), direct)


def test_a_small_model_shows_every_derived_layer_type():
    small = tiny_config(CONFIG_MAPPING["jamba"]())
    assert set(small.layer_types) == {"linear_attention", "full_attention"}
    assert set(small.layers_num_experts) == {1, small.num_experts}


# Models with images


TEXT = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
PLACE = 100
"""The token where an image is put in."""


def gemma3():
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 4,
    }  # fmt: skip
    config = Gemma3Config(text_config=TEXT, vision_config=vision, mm_tokens_per_image=4, image_token_index=PLACE)
    return config, {"pixel_values": torch.randn(1, 3, 16, 16)}


def fuyu():
    text = {**TEXT, "model_type": "persimmon", "hidden_act": "relu2"}
    config = FuyuConfig(text_config=text, image_size=16, patch_size=4, image_token_id=PLACE)
    return config, {"pixel_values": torch.randn(1, 4, 4 * 4 * 3)}


@pytest.mark.parametrize("make", [gemma3, pytest.param(fuyu, marks=pytest.mark.long)])
def test_the_language_decoder_is_cut_and_the_rest_stays(make, tmp_path):
    torch.manual_seed(0)
    config, given = make()
    inputs = {"input_ids": torch.tensor([[5, *[PLACE] * 4, 7, 9, 30]]), **given}
    dense = random_instance(config)
    graph = graph_of(dense, discover_graph(config).groups)
    assert graph.layers.endswith("language_model.layers")
    kept = {g.name: range(g.units * 4 // 5) for g in graph.of_kinds(["mlp"])}
    kept |= {g.name: [0, 2] for g in graph.of_kinds(["attention"]) if g.layer == 1 and g.units == 3}
    assert len(kept) >= 2

    silenced, pruned = copy.deepcopy(dense), copy.deepcopy(dense)
    silence(silenced, graph, kept)
    cut_tensors(pruned, graph, kept)
    save_checkpoint(pruned, tmp_path / "pruned", record={})
    loaded = load_pruned(tmp_path / "pruned", attn_implementation="eager")

    with torch.no_grad():
        expected, without, found = (m(**inputs, use_cache=False).logits for m in (silenced, dense, loaded))
        other = {name: -v if v.is_floating_point() else v for name, v in inputs.items()}
        changed = loaded(**other, use_cache=False).logits
    scale = expected.abs().max()
    assert found.isfinite().all() and float((found - expected).abs().max() / scale) < 2e-4
    # What was removed and what was put in both show in the logits.
    assert float((without - expected).abs().max() / scale) > 1e-3
    assert float((changed - found).abs().max() / scale) > 1e-3

    parts = {name for name in dense.state_dict() if f"{graph.layers}." not in name}
    assert parts and all(torch.equal(dense.state_dict()[name], loaded.state_dict()[name]) for name in parts)
    assert len(loaded.state_dict()) == len(dense.state_dict())
