"""The architectures of GGUF that models are written as: what the graphs of llama.cpp compute, as far as they differ.

Names of tensors and keys are in the ``gguf`` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

QKV = frozenset({"attn_q", "attn_k", "attn_v"})
ALL_LINEAR = QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}


@dataclass(frozen=True)
class Architecture:
    """``name``: in ``general.architecture``.

    ``interleaved``: rotary embedding turns the channels 2i and 2i+1 together, else i and i + head size / 2.
    ``per_layer``: the numbers of heads, KV heads and MLP channels may differ between layers.
    ``fills_hidden``: query heads × head size must be the hidden size.
    ``biases``: linear layers of a block that may have a bias. ``output_bias``: the head may, too.
    ``weights_sum_to_one``: the weights of the experts that a token uses are divided by their sum.
    ``rope_factors``: a divisor for every rotary frequency may be stored.
    ``window_period``: of so many layers in a row, all but the last have a sliding window, counted from the first layer;
    0: no layer has. llama.cpp knows it by the architecture; an array in the file changes nothing.
    ``head``: whether the output head is stored: "absent", it is the embedding; "required", even if it is the embedding;
    "optional", unless it is.
    ``soft_caps``: attention logits and output logits are soft-capped, always. ``output_cap``: the latter may be.
    ``is_gemma``: embeddings are multiplied by √hidden, norms store 1 + weight, the activation is GELU (tanh), else
    SiLU.
    ``wide_scale_layers``: a model of this many layers scales attention by √(heads / hidden), others by
    1/√(head size).
    """

    name: str
    interleaved: bool = False
    per_layer: bool = False
    fills_hidden: bool = False
    biases: frozenset[str] = QKV
    output_bias: bool = False
    weights_sum_to_one: bool = True
    rope_factors: bool = False
    window_period: int = 0
    head: Literal["optional", "absent", "required"] = "optional"
    soft_caps: bool = False
    output_cap: bool = False
    is_gemma: bool = False
    wide_scale_layers: int | None = None

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
    "olmoe": (Architecture("olmoe", weights_sum_to_one=False, fills_hidden=True, head="required"),),
    "gemma": (Architecture("gemma", head="absent", is_gemma=True),),
    "gemma2": (
        Architecture("gemma2", head="absent", is_gemma=True, window_period=2, soft_caps=True, wide_scale_layers=46),
    ),
    "gemma3_text": (Architecture("gemma3", is_gemma=True, window_period=6, output_cap=True, wide_scale_layers=62),),
}
"""``model_type`` of transformers → architectures; the first that can state a model is used. All of these types turn the
rotary channels i and i + head size / 2 together."""
