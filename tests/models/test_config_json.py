"""``config.json``: names of transformers 5 and earlier; sizes of each layer, which some classes read without a shim."""

import copy
import json

import pytest
import torch
import transformers
from checkpoint_cases import INPUT_IDS, SIZES
from llmpruner_llama import LlamaFamily
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaMLP

from llmpruner import build_graph, save_checkpoint
from llmpruner.discovery.cut import cut
from llmpruner.discovery.oracle import logits

DEFAULT = {"rope_type": "default", "rope_theta": 5e5}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}


def saved(folder, prefix, **changes):
    """A model of the class that begins with ``prefix``, and what its checkpoint's configuration states."""
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **copy.deepcopy(changes)})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    assert save_checkpoint(model, folder, record={}) == "stock"
    return model, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("rope", [DEFAULT, LLAMA3], ids=["default", "llama3"])
def test_rotary_embeddings_have_their_names_of_both_versions(rope, tmp_path):
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


def test_a_partly_rotated_head_has_its_names_of_both_versions(tmp_path):
    _, config = saved(tmp_path / "out", "GPTNeoX", rope_parameters=PARTIAL)
    assert (config["rope_theta"], config["partial_rotary_factor"]) == (2e4, 0.5)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.rope_parameters == PARTIAL


def test_the_number_of_experts_has_the_name_of_its_type(tmp_path):
    sizes = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    _, config = saved(tmp_path / "out", "Qwen3Moe", **sizes)
    assert config["num_experts"] == 3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_experts == 3


MODULE = "transformers.models.obedient.modeling_obedient"


class ObedientConfig(LlamaConfig):
    model_type = "obedient"


class Obedient(LlamaForCausalLM):
    """As a class of transformers that builds every layer from its own configuration."""

    config_class = ObedientConfig
    reads = ()
    """Sizes of all layers that it reads besides."""

    def __init__(self, config):
        [getattr(config, name) for name in self.reads]
        uniform = copy.deepcopy(config)
        uniform.per_layer_config = None
        super().__init__(uniform)
        for number, layer in enumerate(self.model.layers):
            own = config.per_layer_config[number] if config.is_heterogeneous else config
            layer.mlp, layer.self_attn = LlamaMLP(own), LlamaAttention(own, number)
            layer.self_attn.config = config
        self.config = self.model.config = config


@pytest.fixture(params=[(), ("intermediate_size",)], ids=["strict", "reads a size of all layers"])
def obedient(request, monkeypatch):
    monkeypatch.setattr(Obedient, "__module__", MODULE)
    monkeypatch.setattr(Obedient, "reads", request.param)
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "obedient", ObedientConfig)
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, ObedientConfig, Obedient)


@pytest.mark.usefixtures("obedient")
@pytest.mark.parametrize(
    ("kept", "stated"),
    [
        ({"layers.0.mlp": range(40)}, {"0": {"intermediate_size": 40}}),
        (
            {"layers.1.mlp": range(8, 16), "layers.2.attention": [1]},
            {"1": {"intermediate_size": 8}, "2": {"num_attention_heads": 2, "num_key_value_heads": 1}},
        ),
    ],
    ids=["widths", "widths and heads"],
)
def test_a_class_that_obeys_is_saved_as_stock(kept, stated, tmp_path):
    config = ObedientConfig(**SIZES)
    torch.manual_seed(0)
    model = Obedient(copy.deepcopy(config)).eval()
    cut(model, build_graph(LlamaFamily(), config), kept, LlamaFamily())
    assert save_checkpoint(model, tmp_path / "out", record={}, family=LlamaFamily()) == "stock"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["per_layer_config"] == stated and "auto_map" not in written
    if kept == {"layers.0.mlp": range(40)}:  # the head size of all layers is computed from the number of heads
        assert bool(written.get("allow_global_per_layer_attribute_access")) == bool(Obedient.reads)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(loaded) is Obedient
    assert torch.equal(logits(loaded, INPUT_IDS), logits(model, INPUT_IDS))
