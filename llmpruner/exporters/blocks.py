"""Sizes of the layers of LLaMA as Nemotron-NAS can state them, and reading such a checkpoint again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from ..errors import UnsupportedModelError
from ..models.meta import base_of, empty_model
from ..models.modeling_llmpruner import apply_record
from ..models.shim import stock_config
from ..models.stock import HEADS
from ..models.surgery import pad
from ..structure.coupling import ATTENTION, HIDDEN, MLP, QUERY, CoupledGroup, CouplingGraph
from .configuration_nemotron_nas import NemotronNasConfig
from .padded import Padded, parameters, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .base import ExportSource

STEP = 256
"""MLP widths are multiples of it."""
CODE = "configuration_nemotron_nas"
"""The file with the class of the configuration."""
_TYPES = ("llama", "mistral")


@dataclass(frozen=True)
class LayerSizes:
    """``width``: of the MLP. ``kv_heads``: key/value heads."""

    width: int
    kv_heads: int
    queries: int
    """Query heads per key/value head."""


@dataclass(frozen=True)
class Sizes:
    """``heads``: query heads of every layer, where they are equal; else of the layer with the most."""

    hidden: int
    head_dim: int
    layers: tuple[LayerSizes, ...]

    @property
    def heads(self) -> int:
        return max(layer.kv_heads * layer.queries for layer in self.layers)

    @property
    def equal_heads(self) -> bool:
        """Whether all layers have the same number of key/value heads, which SGLang expects."""
        return len({layer.kv_heads for layer in self.layers}) == 1

    @property
    def fills_hidden(self) -> bool:
        """Whether the query heads together are as wide as the hidden states, which mlx-lm expects."""
        return self.heads * self.head_dim == self.hidden


def check(model: PreTrainedModel) -> None:
    """Raises `UnsupportedModelError` unless ``model`` is LLaMA in all but the sizes of its layers."""
    config = stock_config(model)
    if config.model_type not in _TYPES:
        raise UnsupportedModelError(
            f"nemotron-nas describes LLaMA's layers only, and {base_of(model).__name__} (model type "
            f"'{config.model_type}') computes others; --to stock pads any architecture"
        )
    biased = next((n for n, _ in model.named_parameters() if n.endswith(".bias")), None)
    if biased is not None:
        raise UnsupportedModelError(f"nemotron-nas has no biases, and the model has '{biased}'; --to stock keeps them")
    if getattr(config, "sliding_window", None) is not None:
        raise UnsupportedModelError("nemotron-nas has no sliding window, and the model's attention has one")
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"nemotron-nas computes silu, and the model '{config.hidden_act}'")
    epsilons = {m.variance_epsilon for m in model.modules() if hasattr(m, "variance_epsilon")}
    if len(epsilons) > 1:
        raise UnsupportedModelError("nemotron-nas has one epsilon for all norms, and the model has several")


def sizes_of(model: PreTrainedModel) -> Sizes:
    """The sizes of a model that `check` accepts."""
    head_dim = model.model.layers[0].self_attn.head_dim
    layers = []
    for layer in model.model.layers:
        kv_heads = layer.self_attn.k_proj.weight.shape[0] // head_dim
        heads = layer.self_attn.q_proj.weight.shape[0] // head_dim
        layers.append(LayerSizes(layer.mlp.gate_proj.weight.shape[0], kv_heads, heads // kv_heads))
    return Sizes(model.get_input_embeddings().weight.shape[1], head_dim, tuple(layers))


def stated(sizes: Sizes, *, equal: bool = False) -> Sizes:
    """The smallest sizes, none below ``sizes``, that the format can state: MLP widths in multiples of 256, and one
    number of query heads for all layers, which the key/value heads of each layer divide. ``equal``: one number of
    key/value heads for all layers, too."""
    layers = sizes.layers
    most_kv = max(layer.kv_heads for layer in layers)
    most_queries = max(layer.queries for layer in layers)
    if equal:
        layers = tuple(LayerSizes(layer.width, most_kv, most_queries) for layer in layers)
    possible = {}
    for heads in range(sizes.heads, most_kv * most_queries + 1):
        numbers = [_kv_heads(heads, layer) for layer in layers]
        if None not in numbers:
            possible[heads] = [n for n in numbers if n is not None]
    # The largest number of heads, of as many groups as the layer with the most, suits every layer.
    heads = min(possible, key=lambda heads: _cost(heads, possible[heads]))
    wide = (
        LayerSizes(-(-layer.width // STEP) * STEP, number, heads // number)
        for layer, number in zip(layers, possible[heads], strict=True)
    )
    return Sizes(sizes.hidden, sizes.head_dim, tuple(wide))


def _kv_heads(heads: int, layer: LayerSizes) -> int | None:
    """The fewest key/value heads that divide ``heads`` and leave room for those of ``layer``."""
    suited = (n for n in range(layer.kv_heads, heads // layer.queries + 1) if heads % n == 0)
    return next(suited, None)


def _cost(heads: int, kv_heads: list[int]) -> int:
    """Heads of all four projections in all layers."""
    return 2 * heads * len(kv_heads) + 2 * sum(kv_heads)


def padded(source: ExportSource, sizes: Sizes, wanted: Sizes) -> Padded:
    """``source``, whose layers have ``sizes``, with zeros up to those ``wanted``."""
    config = copy.deepcopy(source.config)
    queries = max(layer.queries for layer in wanted.layers)
    config.num_key_value_heads = max(layer.kv_heads for layer in wanted.layers)
    config.num_attention_heads = config.num_key_value_heads * queries
    config.head_dim = sizes.head_dim
    config.intermediate_size = max(layer.width for layer in wanted.layers)
    wide, graph = whole(source, config)
    pad(source.model, wide, graph, _units(graph, sizes), _units(graph, wanted), source.family)
    return Padded(wide.eval(), parameters(source.model), parameters(wide))


def _units(graph: CouplingGraph, sizes: Sizes) -> dict[str, list[int]]:
    """The first units of every group, in the numbers that ``sizes`` gives."""
    return {group.name: list(_first(group, sizes)) for group in graph.groups if group.kind in _FIRST}


_FIRST = (MLP, ATTENTION, QUERY, HIDDEN)


def _first(group: CoupledGroup, sizes: Sizes) -> Iterator[int]:
    if group.layer is None:
        yield from range(sizes.hidden)
        return
    layer = sizes.layers[group.layer]
    per_block = {MLP: layer.width, ATTENTION: layer.kv_heads, QUERY: layer.queries}[group.kind]
    size = group.units // group.blocks
    for block, unit in product(range(group.blocks), range(per_block)):
        yield block * size + unit


def configuration(model: PreTrainedModel, sizes: Sizes) -> dict[str, Any]:
    """The content of ``config.json`` for ``model``, whose layers have ``sizes``."""
    config = model.config.to_dict()
    hidden = model.get_input_embeddings().weight.shape[1]
    rope = dict(config.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", None)
    return {
        **{name: value for name, value in config.items() if name not in ("per_layer_config", "llmpruner")},
        "dtype": str(model.dtype).removeprefix("torch."),
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{CODE}.NemotronNasConfig"},
        "model_type": "nemotron-nas",
        "hidden_size": hidden,
        "num_hidden_layers": len(sizes.layers),
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": None,
        "head_dim": sizes.head_dim,
        "intermediate_size": max(layer.width for layer in sizes.layers),
        "rms_norm_eps": model.model.norm.variance_epsilon,
        # Readers from before transformers 5 expect these two instead of `rope_parameters`.
        **({} if theta is None else {"rope_theta": theta}),
        "rope_scaling": rope if rope.get("rope_type", "default") != "default" else None,
        "block_configs": [
            {
                "attention": {"no_op": False, "n_heads_in_group": sizes.heads // layer.kv_heads},
                # No `intermediate_size`: mlx-lm refuses names that it does not know.
                "ffn": {"no_op": False, "ffn_mult": multiplier(layer.width, hidden)},
            }
            for layer in sizes.layers
        ],
    }


def multiplier(width: int, hidden: int) -> float:
    """``ffn_mult`` for a width that is a multiple of 256: in the middle of the interval that gives it, as readers round
    the product, and mlx-lm the multiplier, too."""
    return round(3 * (width - STEP // 2) / (2 * hidden), 6)


def width_of(ffn_mult: float, hidden: int) -> int:
    """The MLP width that readers compute."""
    return -(-int(2 * ffn_mult * hidden / 3) // STEP) * STEP


def read(directory: Path, like: PreTrainedModel) -> PreTrainedModel:
    """The model in ``directory``, built from nothing but its files, with the device of ``like``."""
    stated: Any = NemotronNasConfig.from_pretrained(directory)
    hidden, heads = stated.hidden_size, stated.num_attention_heads
    kv_heads = [heads // block.attention.n_heads_in_group for block in stated.block_configs]
    widths = [width_of(block.ffn.ffn_mult, hidden) for block in stated.block_configs]
    unread = ("auto_map", "architectures", "model_type", "block_configs", *HEADS)
    values = {name: value for name, value in stated.to_dict().items() if name not in unread}
    # LLaMA's class refuses numbers of heads that do not divide the hidden size, when it is made but not afterwards.
    config = LlamaConfig(**values, num_attention_heads=1)
    config.num_attention_heads, config.num_key_value_heads, config.intermediate_size = heads, max(kv_heads), max(widths)
    model = empty_model(LlamaForCausalLM, config)
    shapes: dict[str, tuple[int, int]] = {}
    attributes = {}
    for n, (number, width) in enumerate(zip(kv_heads, widths, strict=True)):
        path = f"model.layers.{n}"
        shapes |= {f"{path}.self_attn.{m}_proj.weight": (number * stated.head_dim, hidden) for m in "kv"}
        shapes |= {f"{path}.mlp.{m}_proj.weight": (width, hidden) for m in ("gate", "up")}
        shapes[f"{path}.mlp.down_proj.weight"] = (hidden, width)
        attributes[f"{path}.self_attn"] = {"num_key_value_groups": heads // number}
    apply_record(model, {"shapes": shapes, "attributes": attributes})
    state = {n: t for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()}
    if stated.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model.to(like.device).eval()
