"""A model in the terms of GGUF: tensors under GGUF's names, sizes read from their shapes, and what modules compute."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf
import torch

from ...errors import UnsupportedModelError
from .architectures import GgufArchitecture

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_STACKED = "gate_up_proj"
_KEYS = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to write. ``shape``: in the model's order of axes. ``read``: its values."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Read from shapes. ``heads``, ``kv_heads``, ``widths``, ``experts``: one entry for each layer; ``widths``: MLP
    channels, of one expert where there are experts; ``experts``: 0 for an ordinary MLP."""

    layers: int
    hidden: int
    vocabulary: int
    head_size: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    widths: tuple[int, ...]
    experts: tuple[int, ...]

    @property
    def are_uniform(self) -> bool:
        return all(len(set(row)) == 1 for row in (self.heads, self.kv_heads, self.widths, self.experts))


def entries(model: PreTrainedModel, architecture: GgufArchitecture) -> dict[str, Entry]:
    """GGUF name → tensor of ``model``. Stacked gate and up projections of experts become two tensors; a head that is
    the embedding is left out.

    Raises `UnsupportedModelError` for a tensor that the architecture does not have.
    """
    names = gguf.get_tensor_name_map(_KEYS[architecture.name], len(decoder_of(model).layers))
    found: dict[str, Entry] = {}
    state = model.state_dict(keep_vars=True)
    embedding = model.get_input_embeddings().weight
    for name, tensor in state.items():
        if name == "lm_head.weight" and tensor is embedding:
            continue
        for part, entry in _parts(name, tensor):
            gguf_name = names.get_name(part, try_suffixes=(".weight", ".bias"))
            if gguf_name is None:
                raise UnsupportedModelError(f"{name}: GGUF's architecture '{architecture.name}' has no such tensor")
            # Experts are parameters without a module of their own.
            found[gguf_name if gguf_name.endswith((".weight", ".bias")) else f"{gguf_name}.weight"] = entry
    if architecture.head == "required" and "output.weight" not in found:
        found["output.weight"] = _whole(embedding)
    return found


def _parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, Entry]]:
    if not name.endswith(_STACKED):
        yield name, _whole(tensor)
        return
    experts, rows, columns = tensor.shape
    half = rows // 2
    for part, start in (("gate_proj", 0), ("up_proj", half)):
        yield (
            name.removesuffix(_STACKED) + part,
            Entry((experts, half, columns), lambda start=start: tensor.detach()[:, start : start + half]),  # type: ignore[misc]
        )


def _whole(tensor: torch.Tensor) -> Entry:
    return Entry(tuple(tensor.shape), tensor.detach)


def decoder_of(model: PreTrainedModel) -> Any:
    """The module that has the list ``layers``."""
    return model.get_decoder()


def sizes_of(model: PreTrainedModel, found: Mapping[str, Entry]) -> Sizes:
    """The sizes of ``model``, from its tensors under GGUF's names. Raises `UnsupportedModelError` for query, key and
    value heads of different sizes."""
    layers = decoder_of(model).layers
    head_size = int(layers[0].self_attn.head_dim)

    def rows(number: int, *names: str) -> int:
        entry = next((found[key] for n in names if (key := f"blk.{number}.{n}.weight") in found), None)
        return 0 if entry is None else entry.shape[-2]

    counts: dict[str, list[int]] = {"heads": [], "kv_heads": [], "widths": [], "experts": []}
    for number in range(len(layers)):
        q, k, v = (rows(number, f"attn_{name}") for name in "qkv")
        if k != v or q % head_size or k % head_size or not k or (q // head_size) % (k // head_size):
            raise UnsupportedModelError(
                f"layer {number} has {q} query, {k} key and {v} value channels with heads of {head_size}: GGUF states "
                "whole heads of one size, and as many query heads for every KV head"
            )
        counts["heads"].append(q // head_size)
        counts["kv_heads"].append(k // head_size)
        counts["widths"].append(rows(number, "ffn_gate", "ffn_gate_exps"))
        counts["experts"].append(rows(number, "ffn_gate_inp"))
    vocabulary, hidden = found["token_embd.weight"].shape
    return Sizes(len(layers), hidden, vocabulary, head_size, **{name: tuple(row) for name, row in counts.items()})


@dataclass(frozen=True)
class Computation:
    """What modules compute beside products with weights, read from the modules where they store it.

    ``scale``: of attention logits. ``windows``: a window for each layer, None for none. ``active_experts``: experts
    that a token uses; 0 without experts. ``sums_to_one``: whether their weights are divided by their sum; None without
    experts. ``rope``: parameters of the rotary embedding by type of layer ("full_attention", "sliding_attention").
    """

    epsilon: float
    activation: str
    scale: float
    embedding_scale: float
    windows: tuple[int | None, ...]
    attention_cap: float | None
    output_cap: float | None
    active_experts: int
    sums_to_one: bool | None
    rope: Mapping[str, Mapping[str, Any]]


def computation_of(model: PreTrainedModel) -> Computation:
    """Raises `UnsupportedModelError` for values that differ between layers where GGUF has one, and for settings that
    GGUF has no place for."""
    decoder, config = decoder_of(model), model.config.get_text_config()
    layers = list(decoder.layers)
    for name in ("clip_qkv", "use_bidirectional_attention"):
        if getattr(config, name, None):
            raise UnsupportedModelError(f"{name} = {getattr(config, name)}: GGUF cannot state it")
    routers = [layer.mlp.gate for layer in layers if hasattr(layer.mlp, "experts")]
    experts = _one({int(r.top_k) for r in routers}, "numbers of experts that a token uses") if routers else 0
    sums = {bool(getattr(router, "norm_topk_prob", True)) for router in routers}
    return Computation(
        epsilon=_one({_epsilon(m) for m in model.modules() if type(m).__name__.endswith("RMSNorm")}, "norm epsilons"),
        activation=getattr(config, "hidden_activation", None) or config.hidden_act,
        scale=_one({float(layer.self_attn.scaling) for layer in layers}, "scales of attention"),
        embedding_scale=float(getattr(decoder.embed_tokens, "scalar_embed_scale", 1.0)),
        windows=tuple(_window(layer.self_attn, config) for layer in layers),
        attention_cap=getattr(config, "attn_logit_softcapping", None),
        output_cap=getattr(config, "final_logit_softcapping", None),
        active_experts=experts,
        sums_to_one=_one(sums, "ways to weigh experts") if routers else None,
        rope=_rope(config.rope_parameters),
    )


def _one(values: set[Any], what: str) -> Any:
    if len(values) != 1:
        listed = ", ".join(map(str, sorted(values)))
        raise UnsupportedModelError(f"the model has different {what} ({listed}), GGUF states one for all layers")
    return next(iter(values))


def _epsilon(norm: nn.Module) -> float:
    own = vars(norm)
    return float(own["variance_epsilon"] if "variance_epsilon" in own else own["eps"])


def _window(attention: nn.Module, config: Any) -> int | None:
    """Some classes store the window of a layer, others read it from the configuration."""
    own = vars(attention)
    window: int | None = own["sliding_window"] if "sliding_window" in own else getattr(config, "sliding_window", None)
    return window


def _rope(parameters: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    nested: dict[str, Mapping[str, Any]] = {n: value for n, value in parameters.items() if isinstance(value, dict)}
    return nested or {"full_attention": parameters}


def layer_and_part(name: str) -> tuple[int | None, str]:
    """``(3, "attn_q")`` of ``blk.3.attn_q.weight``; None for a tensor outside the layers."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)\.(?:weight|bias)", name)
    assert match is not None
    return (None if match[1] is None else int(match[1])), match[2]
