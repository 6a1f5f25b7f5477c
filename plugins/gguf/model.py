"""A model in the terms of GGUF: how the architectures of llama.cpp differ, tensors under GGUF's names, sizes, what
modules compute, and the architecture that states all of it exactly."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf
import torch

from llmpruner import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QKV = frozenset({"attn_q", "attn_k", "attn_v"})
ALL_LINEAR = QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}


@dataclass(frozen=True)
class Architecture:
    """``name``: in ``general.architecture``."""

    name: str
    interleaved: bool = False  # rotary embedding turns the channels 2i and 2i+1 together, else i and i + head size / 2
    per_layer: bool = False  # the numbers of heads, KV heads and MLP channels may differ between layers
    fills_hidden: bool = False  # query heads × head size must be the hidden size
    biases: frozenset[str] = QKV  # linear layers of a block that may have a bias
    output_bias: bool = False  # the head may, too
    weights_sum_to_one: bool = True  # the weights of the experts that a token uses are divided by their sum
    rope_factors: bool = False  # a divisor for every rotary frequency may be stored
    window_period: int = 0
    """Of so many layers in a row, all but the last have a sliding window, counted from the first layer; 0: no layer
    has. llama.cpp knows it by the architecture; an array in the file changes nothing."""
    stores_head: bool = False  # the output head is stored even if it is the embedding
    soft_caps: bool = False  # attention logits and output logits are soft-capped, always
    output_cap: bool = False  # output logits may be
    is_gemma: bool = False  # embeddings are multiplied by √hidden, norms store 1 + weight, GELU (tanh) instead of SiLU
    wide_scale_layers: int | None = None
    """A model of this many layers scales attention by √(heads / hidden), others by 1/√(head size)."""

    def slides(self, layer: int) -> bool:
        """Whether llama.cpp gives the layer of this number a sliding window."""
        return layer % self.window_period < self.window_period - 1 if self.window_period else False


_LLAMA = Architecture("llama", interleaved=True, biases=ALL_LINEAR, rope_factors=True)
_DECI = Architecture("deci", interleaved=True, biases=ALL_LINEAR, rope_factors=True, per_layer=True)

BY_MODEL_TYPE: Mapping[str, tuple[Architecture, ...]] = {
    "llama": (_LLAMA, _DECI),
    "mistral": (_LLAMA, _DECI),
    "mixtral": (_LLAMA,),
    "qwen2": (Architecture("qwen2", fills_hidden=True, output_bias=True), _LLAMA, _DECI),
    "qwen3": (Architecture("qwen3"),),
    "qwen3_moe": (Architecture("qwen3moe"),),
    "olmoe": (Architecture("olmoe", weights_sum_to_one=False, fills_hidden=True, stores_head=True),),
    "gemma": (Architecture("gemma", is_gemma=True),),
    "gemma2": (Architecture("gemma2", is_gemma=True, window_period=2, soft_caps=True, wide_scale_layers=46),),
    "gemma3_text": (Architecture("gemma3", is_gemma=True, window_period=6, output_cap=True, wide_scale_layers=62),),
}
"""``model_type`` of transformers → architectures, of which the first that can state a model is used. All of these types
turn the rotary channels i and i + head size / 2 together."""

KEYS = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
"""Name of an architecture → the ``gguf`` package's key for it."""


@dataclass(frozen=True)
class Facts:
    """What GGUF states besides tensors: sizes by shapes, the rest by modules. Tuples have an entry for each layer."""

    hidden: int
    vocabulary: int
    context: int
    head_size: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    widths: tuple[int, ...]  # MLP channels, of a single expert if there are experts
    experts: tuple[int, ...]  # 0 for an ordinary MLP
    active_experts: int  # that a token uses
    sums_to_one: bool  # whether their weights are divided by their sum
    windows: tuple[int | None, ...]  # None without a sliding window
    epsilon: float
    activation: str
    scale: float  # of attention logits
    embedding_scale: float
    attention_cap: float | None
    output_cap: float | None
    rope: Mapping[str, Any]
    sliding_rope: Mapping[str, Any] | None  # of the layers with a window, if those have their own
    rope_scaling: float  # what cosine and sine are multiplied by


def described(model: PreTrainedModel) -> tuple[Architecture, dict[str, torch.Tensor], Facts]:
    """The architecture that states ``model`` exactly, the tensors under its names, and the facts; or why none can."""
    model_type = model.config.model_type.removeprefix("llmpruner_")
    if model_type not in BY_MODEL_TYPE:
        raise UnsupportedModelError(
            f"the exporter gguf does not write models of type '{model_type}'; it writes {', '.join(BY_MODEL_TYPE)}"
        )
    reason = ""
    for architecture in BY_MODEL_TYPE[model_type]:
        try:
            tensors = tensors_of(model, architecture)
            facts = _facts(model, tensors)
        except UnsupportedModelError as error:
            reason = str(error)
            continue
        reason = next(_refusals(architecture, tensors, facts), "")
        if not reason:
            return architecture, tensors, facts
        reason = f"GGUF's architecture '{architecture.name}' cannot state this {type(model).__name__}: {reason}"
    raise UnsupportedModelError(reason)


def tensors_of(model: PreTrainedModel, architecture: Architecture) -> dict[str, torch.Tensor]:
    """GGUF name → tensor. Stacked gate and up projections of experts become two tensors; a head that is the embedding
    is left out. Raises `UnsupportedModelError` for a tensor that the architecture does not have."""
    names = gguf.get_tensor_name_map(KEYS[architecture.name], len(model.get_decoder().layers))
    embedding = model.get_input_embeddings().weight
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name == "lm_head.weight" and tensor is embedding:
            continue
        stem = name.removesuffix("gate_up_proj")
        if stem != name:
            stored[f"{stem}gate_proj"], stored[f"{stem}up_proj"] = tensor.detach().chunk(2, 1)
        else:
            stored[name] = tensor.detach()
    tensors = {}
    for name, tensor in stored.items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise UnsupportedModelError(f"{name}: GGUF's architecture '{architecture.name}' has no such tensor")
        # Experts are parameters without a module of their own.
        tensors[gguf_name if gguf_name.endswith((".weight", ".bias")) else f"{gguf_name}.weight"] = tensor
    if architecture.stores_head:
        tensors.setdefault("output.weight", embedding.detach())
    return tensors


def layer_and_part(name: str) -> tuple[int | None, str]:
    """``(3, "attn_q")`` of ``blk.3.attn_q.weight``; None for a tensor outside the layers."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)\.(?:weight|bias)", name)
    assert match is not None
    return (None if match[1] is None else int(match[1])), match[2]


def _facts(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> Facts:
    decoder, config = model.get_decoder(), model.config.get_text_config()
    for name in ("clip_qkv", "use_bidirectional_attention"):
        if getattr(config, name, None):
            raise UnsupportedModelError(f"{name} = {getattr(config, name)}: GGUF cannot state it")
    routers = [layer.mlp.gate for layer in decoder.layers if hasattr(layer.mlp, "experts")]
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    nested = {name: value for name, value in config.rope_parameters.items() if isinstance(value, dict)}
    vocabulary, hidden = tensors["token_embd.weight"].shape
    return Facts(
        hidden=hidden,
        vocabulary=vocabulary,
        context=int(config.max_position_embeddings),
        **_layer_sizes(decoder.layers, tensors),
        active_experts=_same((int(router.top_k) for router in routers), "numbers of experts that a token uses", 0),
        sums_to_one=_same((bool(getattr(r, "norm_topk_prob", True)) for r in routers), "weights of experts", True),
        # Some classes store these in a layer, others read them from the configuration.
        windows=tuple(
            getattr(layer.self_attn, "sliding_window", getattr(config, "sliding_window", None))
            for layer in decoder.layers
        ),
        epsilon=_same((getattr(n, "variance_epsilon", None) or n.eps for n in norms), "norm epsilons"),
        activation=getattr(config, "hidden_activation", None) or config.hidden_act,
        scale=_same((float(layer.self_attn.scaling) for layer in decoder.layers), "scales of attention"),
        embedding_scale=float(getattr(decoder.embed_tokens, "scalar_embed_scale", 1.0)),
        attention_cap=getattr(config, "attn_logit_softcapping", None),
        output_cap=getattr(config, "final_logit_softcapping", None),
        rope=nested.get("full_attention", config.rope_parameters),
        sliding_rope=nested.get("sliding_attention"),
        rope_scaling=float(getattr(decoder.rotary_emb, "attention_scaling", 1.0)),
    )


def _layer_sizes(layers: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    head_size = int(layers[0].self_attn.head_dim)

    def rows(layer: int, *parts: str) -> int:
        names = (f"blk.{layer}.{part}.weight" for part in parts)
        return next((tensors[name].shape[-2] for name in names if name in tensors), 0)

    sizes: dict[str, list[int]] = {"heads": [], "kv_heads": [], "widths": [], "experts": []}
    for number in range(len(layers)):
        q, k, v = (rows(number, f"attn_{name}") for name in "qkv")
        if k != v or q % head_size or k % head_size or not k or q % k:
            raise UnsupportedModelError(
                f"layer {number} has {q} query, {k} key and {v} value channels with heads of {head_size}: GGUF states "
                "whole heads of the same size, and as many query heads for every KV head"
            )
        sizes["heads"].append(q // head_size)
        sizes["kv_heads"].append(k // head_size)
        sizes["widths"].append(rows(number, "ffn_gate", "ffn_gate_exps"))
        sizes["experts"].append(rows(number, "ffn_gate_inp"))
    return {"head_size": head_size, **{name: tuple(row) for name, row in sizes.items()}}


def _same(values: Iterator[Any], what: str, default: Any = None) -> Any:
    """The value that all layers have."""
    distinct = sorted(set(values)) or [default]
    if len(distinct) > 1:
        listed = ", ".join(map(str, distinct))
        raise UnsupportedModelError(
            f"the model has different {what} ({listed}), GGUF has a single value for all layers"
        )
    return distinct[0]


def _refusals(architecture: Architecture, tensors: Mapping[str, torch.Tensor], facts: Facts) -> Iterator[str]:
    """Why the architecture can't state the model."""
    sizes = facts.heads, facts.kv_heads, facts.widths, facts.experts
    if not architecture.per_layer and any(len(set(row)) > 1 for row in sizes):
        yield "its layers have different numbers of channels, heads or experts; prune with --shape uniform"
    if not all(facts.widths):
        yield "a layer has no MLP channels; prune with --shape uniform, or remove the layer"
    if architecture.fills_hidden and facts.heads[0] * facts.head_size != facts.hidden:
        yield (
            f"{facts.heads[0]} heads of {facts.head_size} must make up the {facts.hidden} hidden channels; keep all "
            "heads and all hidden channels"
        )
    for name in tensors:
        layer, part = layer_and_part(name)
        allowed = architecture.output_bias if layer is None else part in architecture.biases
        if name.endswith(".bias") and not allowed:
            yield f"it has no bias '{name}'"
    yield from _refused_computations(architecture, facts)
    yield from _refused_rope(architecture, facts.rope)


def _refused_computations(architecture: Architecture, facts: Facts) -> Iterator[str]:
    activations = ("gelu_pytorch_tanh",) if architecture.is_gemma else ("silu", "swish")
    if facts.activation not in activations:
        yield f"its activation is {activations[0]}, not {facts.activation}"
    scale = math.sqrt(facts.hidden) if architecture.is_gemma else 1.0
    if not math.isclose(facts.embedding_scale, scale, rel_tol=1e-6):
        yield f"it multiplies embeddings by {scale:.6g}, the model by {facts.embedding_scale:.6g}"
    if any(facts.experts) and facts.sums_to_one != architecture.weights_sum_to_one:
        yield f"norm_topk_prob must be {architecture.weights_sum_to_one}"
    # Also within the window: a layer's rotary embedding may depend on whether it has a window.
    for number, window in enumerate(facts.windows if architecture.window_period else ()):
        if (window is not None) != architecture.slides(number):
            period = architecture.window_period
            yield (
                f"llama.cpp gives all layers but each {period}{'nd' if period == 2 else 'th'} a sliding window, which "
                f"layer {number} of the model does not fit; keep all layers, or remove {period} layers in a row"
            )
    if architecture.soft_caps != (facts.attention_cap is not None):
        yield f"it {'always caps' if architecture.soft_caps else 'does not cap'} attention logits, unlike the model"
    if (facts.output_cap is not None) != architecture.soft_caps and not architecture.output_cap:
        yield f"it {'always caps' if architecture.soft_caps else 'does not cap'} output logits, unlike the model"


def _refused_rope(architecture: Architecture, rope: Mapping[str, Any]) -> Iterator[str]:
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn") and not (kind == "llama3" and architecture.rope_factors):
        yield f"it cannot state rotary scaling '{kind}'"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "all channels of a head must be rotated"
    yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    if kind == "yarn" and any(rope.get(name, value) not in (value, None) for name, value in yarn.items()):
        yield "llama.cpp computes YaRN only with beta_fast 32, beta_slow 1 and whole channels as bounds (truncate)"
