"""Which architecture of GGUF states a model exactly, or why none does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedModelError
from ...models.modeling_llmpruner import MODEL_TYPE_PREFIX
from .architectures import BY_MODEL_TYPE, GgufArchitecture
from .source import Computation, Entry, Sizes, computation_of, decoder_of, entries, layer_and_part, sizes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ACTIVATIONS = {False: ("silu", "swish"), True: ("gelu_pytorch_tanh",)}
_YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
"""What llama.cpp computes with; it reads no other values for these architectures."""


@dataclass(frozen=True)
class GgufPlan:
    """``context``: the longest context for which the file computes what the model does, in tokens. ``query_factor``:
    what queries are multiplied by, because the runtime derives the scale of attention from other sizes.
    ``yarn_factor``: what cosine and sine are multiplied by, beyond what the runtime derives from YaRN's factor."""

    architecture: GgufArchitecture
    sizes: Sizes
    computation: Computation
    context: int
    query_factor: float
    yarn_factor: float = 1.0

    @property
    def rope(self) -> Mapping[str, Any]:
        """Of the layers without a sliding window; of all layers where there is only one."""
        rope = self.computation.rope
        return rope.get("full_attention") or next(iter(rope.values()))

    @property
    def window(self) -> int | None:
        return next((w for w in self.computation.windows if w is not None), None)


def check_model_type(model_type: str) -> None:
    """Raise `UnsupportedModelError` for a type of model that no architecture of GGUF is known for."""
    if model_type.removeprefix(MODEL_TYPE_PREFIX) not in BY_MODEL_TYPE:
        raise UnsupportedModelError(
            f"the exporter gguf does not write models of type '{model_type.removeprefix(MODEL_TYPE_PREFIX)}'; it "
            f"writes {', '.join(BY_MODEL_TYPE)}"
        )


def plan_of(model: PreTrainedModel) -> GgufPlan:
    """The plan for ``model``, which may be on the meta device. Raises `UnsupportedModelError` with the reason."""
    model_type = model.config.model_type.removeprefix(MODEL_TYPE_PREFIX)
    check_model_type(model_type)
    computation = computation_of(model)
    reason = ""
    for architecture in BY_MODEL_TYPE[model_type]:
        try:
            found = entries(model, architecture)
            sizes = sizes_of(model, found)
        except UnsupportedModelError as error:
            reason = str(error)
            continue
        refusal = _refusal(architecture, found, sizes, computation)
        if refusal is None:
            return _planned(model, architecture, sizes, computation)
        reason = f"GGUF's architecture '{architecture.name}' cannot state this {type(model).__name__}: {refusal}"
    raise UnsupportedModelError(reason)


def _refusal(
    architecture: GgufArchitecture, found: Mapping[str, Entry], sizes: Sizes, computation: Computation
) -> str | None:
    return (
        _refused_sizes(architecture, sizes)
        or _refused_biases(architecture, found)
        or _refused_computation(architecture, sizes, computation)
        or _refused_rope(architecture, computation)
    )


def _refused_sizes(architecture: GgufArchitecture, sizes: Sizes) -> str | None:
    if not sizes.are_uniform and not architecture.per_layer:
        return "its layers have different numbers of channels, heads or experts; prune with --shape uniform"
    if not all(sizes.widths):
        return "a layer has no MLP channels; prune with --shape uniform, or remove the layer"
    if any(sizes.experts) != architecture.experts and not architecture.optional_experts:
        return "its MLPs are mixtures of experts" if any(sizes.experts) else "its MLPs have no experts"
    if architecture.fills_hidden and sizes.heads[0] * sizes.head_size != sizes.hidden:
        return (
            f"{sizes.heads[0]} heads of {sizes.head_size} must make up the {sizes.hidden} hidden channels; keep all "
            "heads and all hidden channels"
        )
    if architecture.equal_heads and sizes.heads != sizes.kv_heads:
        return "it needs as many KV heads as query heads"
    return None


def _refused_biases(architecture: GgufArchitecture, found: Mapping[str, Entry]) -> str | None:
    for name in found:
        layer, part = layer_and_part(name)
        allowed = part in architecture.biases if layer is not None else architecture.output_bias
        if name.endswith(".bias") and not allowed:
            return f"it has no bias '{name}'"
    return None


def _refused_computation(architecture: GgufArchitecture, sizes: Sizes, computation: Computation) -> str | None:
    if computation.activation not in _ACTIVATIONS[architecture.gelu]:
        return f"its activation is {_ACTIVATIONS[architecture.gelu][0]}, not {computation.activation}"
    expected = math.sqrt(sizes.hidden) if architecture.scaled_embedding else 1.0
    if not math.isclose(computation.embedding_scale, expected, rel_tol=1e-6):
        return (
            f"it multiplies embeddings by {expected:.6g}, the model by {computation.embedding_scale:.6g}; keep all "
            "hidden channels"
        )
    if computation.sums_to_one is not None and computation.sums_to_one != architecture.weights_sum_to_one:
        return f"norm_topk_prob must be {architecture.weights_sum_to_one}"
    return _refused_windows(architecture, computation) or _refused_caps(architecture, computation)


def _refused_windows(architecture: GgufArchitecture, computation: Computation) -> str | None:
    period = architecture.window_period
    if not period:
        return None
    if len(set(computation.windows) - {None}) > 1:
        return "its layers have sliding windows of different sizes"
    # Also within the window: a layer's rotary embedding may depend on whether it has one.
    for number, window in enumerate(computation.windows):
        if (window is not None) != architecture.slides(number):
            return (
                f"llama.cpp gives all layers but each {period}{'nd' if period == 2 else 'th'} a sliding window, which "
                f"layer {number} of the model does not fit; keep all layers, or remove {period} layers in a row"
            )
    return None


def _refused_caps(architecture: GgufArchitecture, computation: Computation) -> str | None:
    inner, output = computation.attention_cap is not None, computation.output_cap is not None
    if architecture.soft_caps and not (inner and output):
        return "it always caps logits, the model does not"
    if (inner and not architecture.soft_caps) or (output and not (architecture.soft_caps or architecture.output_cap)):
        return "it does not cap logits, the model does"
    return None


def _refused_rope(architecture: GgufArchitecture, computation: Computation) -> str | None:
    kinds = {"linear", "yarn", "default", *(("llama3",) if architecture.rope_factors else ())}
    if len(computation.rope) > 1 and not architecture.window_period:
        return "its layers have different rotary embeddings"
    for layers, rope in computation.rope.items():
        kind = rope.get("rope_type", "default")
        if kind not in kinds or (kind != "default" and layers == "sliding_attention"):
            return f"it cannot state rotary scaling '{kind}'"
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            return "all channels of a head must be rotated"
        if kind == "yarn" and any((rope.get(name) or value) != value for name, value in _YARN_BETAS.items()):
            return "llama.cpp computes YaRN with beta_fast 32 and beta_slow 1 alone"
        if kind == "yarn" and not rope.get("truncate", True):
            return "llama.cpp computes YaRN with whole channels as bounds alone (truncate)"
    return None


def _planned(
    model: PreTrainedModel, architecture: GgufArchitecture, sizes: Sizes, computation: Computation
) -> GgufPlan:
    context = int(model.config.get_text_config().max_position_embeddings)
    if not architecture.window_period:
        # Inside its window, a layer attends to all tokens before.
        context = min([context, *(w for w in computation.windows if w is not None)])
    plan = GgufPlan(architecture, sizes, computation, context, computation.scale / runtime_scale(architecture, sizes))
    if plan.rope.get("rope_type") != "yarn":
        return plan
    scaling = float(decoder_of(model).rotary_emb.attention_scaling)
    derived = 1 + 0.1 * math.log(plan.rope["factor"])
    return GgufPlan(architecture, sizes, computation, context, plan.query_factor, scaling / derived)


def runtime_scale(architecture: GgufArchitecture, sizes: Sizes) -> float:
    """What llama.cpp multiplies attention logits by."""
    if architecture.wide_scale_layers == sizes.layers:
        return 1 / math.sqrt(sizes.hidden // sizes.heads[0])
    return 1 / math.sqrt(sizes.head_size)
