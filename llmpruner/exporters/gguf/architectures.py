"""The architectures of GGUF that models are written as: what the graphs of llama.cpp compute, as far as they differ.

Names of tensors and keys are in the ``gguf`` package. A further architecture is an entry here, if its graph consists of
the parts that `reference.gguf_logits` knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

QKV = frozenset({"attn_q", "attn_k", "attn_v"})
ALL_LINEAR = QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}


@dataclass(frozen=True)
class GgufArchitecture:
    """``name``: in ``general.architecture``.

    ``interleaved``: rotary embedding turns the channels 2i and 2i+1 together, else i and i + head size / 2.
    ``per_layer``: the numbers of heads, KV heads and MLP channels may differ between layers.
    ``fills_hidden``: query heads × head size must be the hidden size.
    ``equal_heads``: there must be as many KV heads as query heads.
    ``biases``: linear layers of a block that may have one. ``output_bias``: the head may, too.
    ``experts``: every MLP is a mixture of experts. ``optional_experts``: it may be one. ``weights_sum_to_one``: the
    weights of the experts that a token uses are divided by their sum.
    ``rope_factors``: a divisor for every rotary frequency may be stored.
    ``window_period``: of so many layers in a row, all but the last have a sliding window, counted from the first layer;
    0: no layer has one. llama.cpp knows it by the architecture; an array in the file changes nothing.
    ``head``: whether the output head is stored: "absent", it is the embedding; "required", even where it is the
    embedding; "optional", unless it is.
    ``soft_caps``: attention logits and output logits are soft-capped, always. ``output_cap``: the latter may be.
    ``scaled_embedding``: embeddings are multiplied by √hidden, and norms store 1 + weight.
    ``gelu``: the activation is GELU (tanh), else SiLU.
    ``wide_scale_layers``: a model of this many layers scales attention by √(heads / hidden), others by
    1/√(head size).
    """

    name: str
    interleaved: bool = False
    per_layer: bool = False
    fills_hidden: bool = False
    equal_heads: bool = False
    biases: frozenset[str] = QKV
    output_bias: bool = False
    experts: bool = False
    optional_experts: bool = False
    weights_sum_to_one: bool = True
    rope_factors: bool = False
    window_period: int = 0
    head: Literal["optional", "absent", "required"] = "optional"
    soft_caps: bool = False
    output_cap: bool = False
    scaled_embedding: bool = False
    gelu: bool = False
    wide_scale_layers: int | None = None

    def slides(self, layer: int) -> bool:
        """Whether llama.cpp gives the layer of this number a sliding window."""
        return layer % self.window_period < self.window_period - 1 if self.window_period else False


_LLAMA = GgufArchitecture("llama", interleaved=True, biases=ALL_LINEAR, rope_factors=True, optional_experts=True)
_DECI = GgufArchitecture("deci", interleaved=True, biases=ALL_LINEAR, rope_factors=True, per_layer=True)
_QWEN2 = GgufArchitecture("qwen2", fills_hidden=True, output_bias=True)
_QWEN3 = GgufArchitecture("qwen3")
_QWEN3_MOE = GgufArchitecture("qwen3moe", experts=True)
_OLMOE = GgufArchitecture(
    "olmoe", experts=True, weights_sum_to_one=False, fills_hidden=True, equal_heads=True, head="required"
)
_GEMMA = GgufArchitecture("gemma", head="absent", scaled_embedding=True, gelu=True)
_GEMMA2 = GgufArchitecture(
    "gemma2", head="absent", scaled_embedding=True, gelu=True, window_period=2, soft_caps=True, wide_scale_layers=46
)
_GEMMA3 = GgufArchitecture(
    "gemma3", scaled_embedding=True, gelu=True, window_period=6, output_cap=True, wide_scale_layers=62
)

BY_MODEL_TYPE: Mapping[str, tuple[GgufArchitecture, ...]] = {
    "llama": (_LLAMA, _DECI),
    "mistral": (_LLAMA, _DECI),
    "mixtral": (_LLAMA,),
    "qwen2": (_QWEN2, _LLAMA, _DECI),
    "qwen3": (_QWEN3,),
    "qwen3_moe": (_QWEN3_MOE,),
    "olmoe": (_OLMOE,),
    "gemma": (_GEMMA,),
    "gemma2": (_GEMMA2,),
    "gemma3_text": (_GEMMA3,),
}
"""``model_type`` of transformers → architectures, the first that can state a model is used. All of these types turn the
rotary channels i and i + head size / 2 together."""

BY_NAME: Mapping[str, GgufArchitecture] = {found.name: found for row in BY_MODEL_TYPE.values() for found in row}
