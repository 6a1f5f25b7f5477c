"""Nemotron-NAS: LLaMA with a width of its own for every layer, as vLLM, SGLang and mlx-lm read it.

The exporter pads layers with zeros to what the format can state, writes, and reads back.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmpruner import CheckpointError, ComponentSettings, Exporter, ExportTask, UnsupportedModelError, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NemotronNasExporter(Exporter):
    """LLaMA and Mistral whose layers have different widths, for runtimes that serve Nemotron-NAS. MLP widths become
    multiples of 256, and all layers get the same number of query heads, by zeros that leave outputs equal; the line
    that is printed says what that costs. Raises `UnsupportedModelError` for other architectures, biases, and sliding
    windows."""

    name = "nemotron-nas"
    summary = "LLaMA with widths per layer (block_configs), for vLLM, SGLang and mlx-lm"
    for_other_programs = True

    class Settings(ComponentSettings):
        equal_heads: bool = Field(
            False, description="The same number of key/value heads in all layers, by zeros: SGLang needs it."
        )

    settings: Settings

    def export(self, task: ExportTask) -> str:
        from huggingface_hub import save_torch_state_dict

        from . import layers

        model = task.model
        _check(model)
        sizes = layers.sizes_of(model)
        stated = layers.stated(sizes, equal=self.settings.equal_heads)
        task.progress.status("Padding layers to the widths of the format")
        state = layers.padded(model, sizes, stated)
        save_torch_state_dict(state, task.directory)
        config = layers.configuration(model, stated)
        (task.directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(Path(__file__).with_name(f"{layers.CODE}.py"), task.directory / f"{layers.CODE}.py")
        task.save_tokenizer()
        task.check_logits(read(task.directory, model))
        before, after = sum(p.numel() for p in model.parameters()), sum(t.numel() for t in state.values())
        # SGLang expects as many key/value heads in all layers, mlx-lm query heads as wide as the hidden states.
        equal_heads = len({layer.kv_heads for layer in stated.layers}) == 1
        fills_hidden = stated.heads * stated.head_dim == stated.hidden
        others = ["SGLang"] * equal_heads + ["mlx-lm"] * fills_hidden
        also = f", and {' and '.join(others)} read{'s' * (len(others) == 1)} it" if others else ""
        return (
            f"vLLM loads it as DeciLMForCausalLM with --trust-remote-code{also}; padded with zeros from {before:,} to "
            f"{after:,} parameters ({after / before - 1:+.1%})"
        )


def _check(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` unless ``model`` is LLaMA in all but the sizes of its layers."""
    config = model.config
    if config.model_type not in ("llama", "mistral"):
        raise UnsupportedModelError(
            f"nemotron-nas describes LLaMA's layers only, and {type(model).__name__} (model type "
            f"'{config.model_type}') computes others; prune with --shape uniform"
        )
    biased = next((n for n, _ in model.named_parameters() if n.endswith(".bias")), None)
    if biased is not None:
        raise UnsupportedModelError(f"nemotron-nas has no biases, and the model has '{biased}'")
    if getattr(config, "sliding_window", None) is not None:
        raise UnsupportedModelError("nemotron-nas has no sliding window, and the model's attention has one")
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"nemotron-nas computes silu, and the model '{config.hidden_act}'")


def read(directory: Path, like: PreTrainedModel) -> PreTrainedModel:
    """The model in ``directory``, built from its files alone, on the device of ``like``. Raises `CheckpointError` when
    tensors have other shapes than the configuration states."""
    from safetensors.torch import load_file
    from torch import nn
    from transformers import LlamaConfig

    from llmpruner import meta_model

    from .configuration_nemotron_nas import NemotronNasConfig
    from .layers import width_of

    stated: Any = NemotronNasConfig.from_pretrained(directory)
    heads = stated.num_attention_heads
    skip = ("auto_map", "architectures", "model_type", "block_configs", "num_attention_heads", "num_key_value_heads")
    values = {name: value for name, value in stated.to_dict().items() if name not in skip}
    # LLaMA's class refuses numbers of heads that do not divide the hidden size, when it is made but not afterwards.
    config = LlamaConfig(**values, num_attention_heads=1)
    config.num_attention_heads = config.num_key_value_heads = heads
    model = meta_model(config)
    state = {n: t for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(tensor))
    if stated.tie_word_embeddings:
        model.tie_weights()
    for number, (layer, block) in enumerate(zip(model.model.layers, stated.block_configs, strict=True)):
        attention = layer.self_attn
        attention.num_key_value_groups = block.attention.n_heads_in_group
        kv_channels = heads // block.attention.n_heads_in_group * stated.head_dim
        shape = len(attention.k_proj.weight), len(layer.mlp.gate_proj.weight)
        if shape != (kv_channels, width_of(block.ffn.ffn_mult, stated.hidden_size)):
            raise CheckpointError(f"the written layer {number} has other sizes than its configuration states")
    return model.to(like.device).eval()


@hookimpl
def llmpruner_exporters() -> list[type]:
    return [NemotronNasExporter]
