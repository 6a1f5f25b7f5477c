"""Models with images: the language decoder is found and cut, and nothing else changes."""

import copy

import pytest
import torch
from transformers import FuyuConfig, Gemma3Config

from llmpruner import load_pruned, save_checkpoint
from llmpruner.discovery.groups import discover_graph
from llmpruner.discovery.tiny import random_instance
from llmpruner.models.meta import graph_of
from llmpruner.models.surgery import cut_tensors, silence

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
