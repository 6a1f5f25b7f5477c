"""Removing whole layers where the configuration does not simply count them."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from llmpruner.discovery.oracle import VERIFIED, cached_difference, logits
from llmpruner.discovery.tiny import Small, random_instance, tiny_config
from llmpruner.discovery.verify import verify
from llmpruner.models.family import AutoFamily
from llmpruner.models.meta import decoder_layers
from llmpruner.models.modeling_llmpruner import drop_layers
from llmpruner.models.opening import load_pruned
from llmpruner.models.save import save_checkpoint
from llmpruner.structure.coupling import LAYER

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

TOKENS = torch.randint(40, 128, (2, 9), generator=torch.Generator().manual_seed(0))


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
    direct = logits(shortened([2, 4]), TOKENS)
    assert again.layers_kept["kept"] == [2, 4]
    assert torch.equal(logits(again, TOKENS), direct)
    assert cached_difference(again, TOKENS) < 1e-5
    assert torch.equal(logits(load_pruned(tmp_path / "plain", attn_implementation="eager"), TOKENS), direct)


def test_a_small_model_shows_every_derived_layer_type():
    small = tiny_config(CONFIG_MAPPING["jamba"]())
    assert set(small.layer_types) == {"linear_attention", "full_attention"}
    assert set(small.layers_num_experts) == {1, small.num_experts}
