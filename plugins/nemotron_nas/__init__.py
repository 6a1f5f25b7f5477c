"""Nemotron-NAS: LLaMA with a width of its own for every layer, as vLLM, SGLang and mlx-lm read it.

The exporter pads layers with zeros to what the format can state, writes, and reads back. ``config.json`` has for each
layer the number of query heads per key/value head, and a multiplier m from which readers compute the MLP width:
int(2·m·hidden/3), rounded up to a multiple of 256. The number of query heads is the same in all layers.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmpruner import CheckpointError, ComponentSettings, Exporter, ExportTask, UnsupportedModelError, hookimpl

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CODE = "configuration_nemotron_nas"  # the file with the class of the configuration
STEP = 256  # MLP widths are multiples of it


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

        model = task.model
        _check(model)
        sizes = sizes_of(model)
        wide = stated(sizes, equal=self.settings.equal_heads)
        task.progress.status("Padding layers to the widths of the format")
        state = padded(model, sizes, wide)
        save_torch_state_dict(state, task.directory)
        config = configuration(model, wide)
        (task.directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(Path(__file__).with_name(f"{CODE}.py"), task.directory / f"{CODE}.py")
        task.save_tokenizer()
        task.check_logits(read(task.directory, model))
        before, after = sum(p.numel() for p in model.parameters()), sum(t.numel() for t in state.values())
        # SGLang expects as many key/value heads in all layers, mlx-lm query heads as wide as the hidden states.
        equal_heads = len({layer.kv_heads for layer in wide.layers}) == 1
        fills_hidden = wide.heads * wide.head_dim == wide.hidden
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


@dataclass(frozen=True)
class LayerSizes:
    """``width``: of the MLP. ``queries``: query heads per key/value head."""

    width: int
    kv_heads: int
    queries: int


@dataclass(frozen=True)
class Sizes:
    hidden: int
    head_dim: int
    layers: tuple[LayerSizes, ...]

    @property
    def heads(self) -> int:
        """Query heads of every layer if they are equal; else of the layer with the most."""
        return max(layer.kv_heads * layer.queries for layer in self.layers)


def sizes_of(model: PreTrainedModel) -> Sizes:
    head_dim = model.model.layers[0].self_attn.head_dim
    layers = []
    for layer in model.model.layers:
        kv_heads = len(layer.self_attn.k_proj.weight) // head_dim
        heads = len(layer.self_attn.q_proj.weight) // head_dim
        layers.append(LayerSizes(len(layer.mlp.gate_proj.weight), kv_heads, heads // kv_heads))
    return Sizes(model.get_input_embeddings().weight.shape[1], head_dim, tuple(layers))


def stated(sizes: Sizes, *, equal: bool = False) -> Sizes:
    """The smallest sizes, none below ``sizes``, that the format can state: MLP widths in multiples of 256, one number
    of query heads, which the key/value heads of each layer divide. ``equal``: one number of key/value heads, too."""
    layers = sizes.layers
    most_kv = max(layer.kv_heads for layer in layers)
    most_queries = max(layer.queries for layer in layers)
    if equal:
        layers = tuple(LayerSizes(layer.width, most_kv, most_queries) for layer in layers)
    possible: dict[int, list[int]] = {}
    for heads in range(sizes.heads, most_kv * most_queries + 1):
        # The fewest key/value heads of each layer that divide them and leave room for its own; 0 if there are none.
        numbers = [
            next((n for n in range(layer.kv_heads, heads // layer.queries + 1) if heads % n == 0), 0)
            for layer in layers
        ]
        if all(numbers):
            possible[heads] = numbers
    # The largest number, the groups of the layer with the most, suits every layer. A layer has two projections of query
    # heads and two of key/value heads.
    heads = min(possible, key=lambda heads: heads * len(layers) + sum(possible[heads]))
    wide = (
        LayerSizes(-(-layer.width // STEP) * STEP, number, heads // number)
        for layer, number in zip(layers, possible[heads], strict=True)
    )
    return Sizes(sizes.hidden, sizes.head_dim, tuple(wide))


def padded(model: PreTrainedModel, sizes: Sizes, wide: Sizes) -> dict[str, torch.Tensor]:
    """The state dict of ``model``, of ``sizes``, with zeros up to ``wide``: outputs are equal."""
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    hidden, size = sizes.hidden, sizes.head_dim
    for number, (old, new) in enumerate(zip(sizes.layers, wide.layers, strict=True)):
        q, k, v, o = (f"model.layers.{number}.self_attn.{m}_proj.weight" for m in "qkvo")
        gate, up, down = (f"model.layers.{number}.mlp.{m}_proj.weight" for m in ("gate", "up", "down"))
        by_head = state[q].view(old.kv_heads, old.queries, size, hidden)
        state[q] = _with_zeros(by_head, new.kv_heads, new.queries, size, hidden).flatten(0, 2)
        by_head = state[o].view(hidden, old.kv_heads, old.queries, size)
        state[o] = _with_zeros(by_head, hidden, new.kv_heads, new.queries, size).flatten(1)
        for name in (k, v):
            state[name] = _with_zeros(state[name], new.kv_heads * size, hidden)
        for name in (gate, up):
            state[name] = _with_zeros(state[name], new.width, hidden)
        state[down] = _with_zeros(state[down], hidden, new.width)
    return state


def _with_zeros(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """``tensor`` at the start of every axis of ``shape``, and zeros beyond."""
    wide = tensor.new_zeros(shape)
    wide[tuple(slice(size) for size in tensor.shape)] = tensor
    return wide


def configuration(model: PreTrainedModel, sizes: Sizes) -> dict[str, Any]:
    """The content of ``config.json`` for ``model``, padded to ``sizes``."""
    config = model.config.to_dict()
    rope = dict(model.config.rope_parameters)
    theta = rope.pop("rope_theta")
    return {
        **{name: value for name, value in config.items() if name not in ("per_layer_config", "llmpruner")},
        "dtype": str(model.dtype).removeprefix("torch."),
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{CODE}.NemotronNasConfig"},
        "model_type": "nemotron-nas",
        "hidden_size": sizes.hidden,
        "num_hidden_layers": len(sizes.layers),
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": None,
        "head_dim": sizes.head_dim,
        "intermediate_size": max(layer.width for layer in sizes.layers),
        "rms_norm_eps": model.model.norm.variance_epsilon,
        # Readers from before transformers 5 expect these two instead of `rope_parameters`.
        "rope_theta": theta,
        "rope_scaling": rope if rope.get("rope_type", "default") != "default" else None,
        "block_configs": [
            {
                "attention": {"no_op": False, "n_heads_in_group": layer.queries},
                # No `intermediate_size`: mlx-lm refuses names that it does not know.
                "ffn": {"no_op": False, "ffn_mult": multiplier(layer.width, sizes.hidden)},
            }
            for layer in sizes.layers
        ],
    }


def multiplier(width: int, hidden: int) -> float:
    """``ffn_mult`` for a multiple of 256: the middle of its interval, as readers round the product, mlx-lm this too."""
    return round(3 * (width - STEP // 2) / (2 * hidden), 6)


def width_of(ffn_mult: float, hidden: int) -> int:
    """The MLP width that readers compute."""
    return -(-int(2 * ffn_mult * hidden / 3) // STEP) * STEP


def read(directory: Path, like: PreTrainedModel) -> PreTrainedModel:
    """The model in ``directory`` on the device of ``like``, built from files alone, whose sizes must be as stated."""
    from safetensors.torch import load_file
    from torch import nn
    from transformers import LlamaConfig

    from llmpruner import meta_model

    from .configuration_nemotron_nas import NemotronNasConfig

    written: Any = NemotronNasConfig.from_pretrained(directory)
    heads = written.num_attention_heads
    skip = ("auto_map", "architectures", "model_type", "block_configs", "num_attention_heads", "num_key_value_heads")
    values = {name: value for name, value in written.to_dict().items() if name not in skip}
    # LLaMA's class refuses numbers of heads that do not divide the hidden size, when it is made but not afterwards.
    config = LlamaConfig(**values, num_attention_heads=1)
    config.num_attention_heads = config.num_key_value_heads = heads
    model = meta_model(config)
    state = {n: t for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(tensor))
    if written.tie_word_embeddings:
        model.tie_weights()
    for number, (layer, block) in enumerate(zip(model.model.layers, written.block_configs, strict=True)):
        attention = layer.self_attn
        attention.num_key_value_groups = block.attention.n_heads_in_group
        kv_channels = heads // block.attention.n_heads_in_group * written.head_dim
        shape = len(attention.k_proj.weight), len(layer.mlp.gate_proj.weight)
        if shape != (kv_channels, width_of(block.ffn.ffn_mult, written.hidden_size)):
            raise CheckpointError(f"the written layer {number} has other sizes than its configuration states")
    return model.to(like.device).eval()


@hookimpl
def llmpruner_exporters() -> list[type]:
    return [NemotronNasExporter]
