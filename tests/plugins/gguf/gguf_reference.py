"""The logits that a GGUF file gives, computed from the file alone, as the graphs of llama.cpp are defined.

It shows whether every size, scale and order of channels in a file is what llama.cpp expects; no runtime has to be
installed. Source: ``src/models/*.cpp`` and ``llama-graph.cpp`` of llama.cpp.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import torch
from llmpruner_gguf.model import BY_MODEL_TYPE, Architecture
from torch.nn import functional as F

BY_NAME = {architecture.name: architecture for row in BY_MODEL_TYPE.values() for architecture in row}
_YARN_BETAS = 32.0, 1.0
_LEAST_WEIGHT = 2.0**-14
"""Sums of weights of experts are at least this."""


def gguf_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) in float32 for the token numbers ``ids`` (T,). One layer is in memory at a time."""
    file = GgufFile(path)
    architecture = file.architecture
    hidden = file["token_embd.weight"][ids]
    if architecture.is_gemma:
        hidden = hidden * math.sqrt(hidden.shape[-1])
    for layer in range(int(file.key("block_count"))):
        hidden = _block(file, layer, hidden)
    hidden = file.normed("output_norm", hidden)
    head = "output" if "output.weight" in file else "token_embd"
    logits = file.product(head, hidden)
    cap = file.key("final_logit_softcapping", 0.0)
    return torch.tanh(logits / cap) * cap if cap else logits


class GgufFile:
    """Keys without the prefix of the architecture, and tensors in float32."""

    def __init__(self, path: Path) -> None:
        self._reader = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture: Architecture = BY_NAME[self._reader.fields["general.architecture"].contents()]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())

    @property
    def types(self) -> dict[str, gguf.GGMLQuantizationType]:
        return {name: tensor.tensor_type for name, tensor in self._tensors.items()}

    def key(self, name: str, default: Any = None) -> Any:
        field = self._reader.fields.get(f"{self.architecture.name}.{name}")
        return default if field is None else field.contents()

    def per_layer(self, name: str, layer: int) -> int:
        value = self.key(name)
        return int(value[layer] if isinstance(value, list) else value)

    def product(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        outputs = F.linear(inputs, self[f"{name}.weight"])
        return outputs + self[f"{name}.bias"] if f"{name}.bias" in self else outputs

    def normed(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        """The RMS norm over the last axis; ``inputs`` where the file has no such norm."""
        if f"{name}.weight" not in self:
            return inputs
        weight = self[f"{name}.weight"]
        return F.rms_norm(inputs, weight.shape, weight, self.key("attention.layer_norm_rms_epsilon"))

    @cached_property
    def windows(self) -> list[int | None]:
        layers, size = int(self.key("block_count")), self.key("attention.sliding_window", 0)
        return [size if size and self.architecture.slides(layer) else None for layer in range(layers)]


def _block(file: GgufFile, layer: int, inputs: torch.Tensor) -> torch.Tensor:
    block = f"blk.{layer}"
    attended = _attention(file, layer, file.normed(f"{block}.attn_norm", inputs))
    middle = inputs + file.normed(f"{block}.post_attention_norm", attended)
    normed = file.normed(f"{block}.ffn_norm", middle)
    is_mixture = f"{block}.ffn_gate_inp.weight" in file
    outputs = _mixture(file, block, normed) if is_mixture else _mlp(file, block, normed)
    return middle + file.normed(f"{block}.post_ffw_norm", outputs)


def _attention(file: GgufFile, layer: int, inputs: torch.Tensor) -> torch.Tensor:
    block, tokens, size = f"blk.{layer}", len(inputs), int(file.key("attention.key_length"))
    heads = file.per_layer("attention.head_count", layer)
    kv_heads = file.per_layer("attention.head_count_kv", layer)
    q, k, v = (file.product(f"{block}.attn_{name}", inputs) for name in "qkv")
    q, k = (
        _rotated(file, layer, _normed_heads(file, f"{block}.attn_{name}_norm", states, size))
        for name, states in (("q", q), ("k", k))
    )
    q, k, v = (states.transpose(0, 1) for states in (q, k, v.view(tokens, kv_heads, size)))
    k, v = (states.repeat_interleave(heads // kv_heads, 0) for states in (k, v))
    logits = q @ k.transpose(1, 2) * _scale(file, heads, size)
    cap = file.key("attn_logit_softcapping", 0.0)
    logits = torch.tanh(logits / cap) * cap if cap else logits
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    window = file.windows[layer] or tokens
    logits = logits.masked_fill((distance < 0) | (distance >= window), -torch.inf)
    mixed = logits.softmax(-1) @ v
    return file.product(f"{block}.attn_output", mixed.transpose(0, 1).flatten(1))


def _normed_heads(file: GgufFile, norm: str, states: torch.Tensor, size: int) -> torch.Tensor:
    """``states`` (T, heads × size) as (T, heads, size), under a norm over each head, over all heads, or under none."""
    if f"{norm}.weight" in file and file[f"{norm}.weight"].numel() != size:
        return file.normed(norm, states).view(len(states), -1, size)
    return file.normed(norm, states.view(len(states), -1, size))


def _scale(file: GgufFile, heads: int, size: int) -> float:
    if file.architecture.wide_scale_layers == file.key("block_count"):
        return float((file.key("embedding_length") // heads) ** -0.5)
    return float(size**-0.5)


def _rotated(file: GgufFile, layer: int, states: torch.Tensor) -> torch.Tensor:
    """``states`` (T, heads, size), rotated by position."""
    frequencies, magnitude = _frequencies(file, layer, states.shape[-1])
    angles = torch.arange(len(states))[:, None, None] * frequencies
    cosine, sine = angles.cos() * magnitude, angles.sin() * magnitude
    if file.architecture.interleaved:
        first, second = states[..., ::2], states[..., 1::2]
        return torch.stack([first * cosine - second * sine, first * sine + second * cosine], -1).flatten(-2)
    first, second = states.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


def _frequencies(file: GgufFile, layer: int, size: int) -> tuple[torch.Tensor, float]:
    """Rotary frequencies (size / 2,), and what cosine and sine are multiplied by."""
    slides = file.windows[layer] is not None
    base = file.key("rope.freq_base", 10000.0)
    # The layers with a window have a base of their own, and no scaling.
    own_base = file.key("rope.freq_base_swa") if slides else None
    frequencies = (own_base or base) ** -(torch.arange(0, size, 2) / size)
    if file.architecture.rope_factors and "rope_freqs.weight" in file:
        frequencies = frequencies / file["rope_freqs.weight"]
    kind = file.key("rope.scaling.type", "none")
    factor = 1.0 if own_base is not None or kind == "none" else file.key("rope.scaling.factor", 1.0)
    magnitude = file.key("rope.scaling.attn_factor", 1.0)
    if kind != "yarn":
        return frequencies / factor, magnitude
    original = file.key("rope.scaling.original_context_length")
    low, high = (size * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(base)) for beta in _YARN_BETAS)
    low, high = max(0, math.floor(low)), min(size - 1, math.ceil(high))
    kept = 1 - ((torch.arange(size // 2) - low) / max(0.001, high - low)).clamp(0, 1)
    return frequencies / factor * (1 - kept) + frequencies * kept, magnitude * (1 + 0.1 * math.log(factor))


def _activated(file: GgufFile, gate: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh") if file.architecture.is_gemma else F.silu(gate)


def _mlp(file: GgufFile, block: str, inputs: torch.Tensor) -> torch.Tensor:
    gate, up = (file.product(f"{block}.ffn_{name}", inputs) for name in ("gate", "up"))
    return file.product(f"{block}.ffn_down", _activated(file, gate) * up)


def _mixture(file: GgufFile, block: str, inputs: torch.Tensor) -> torch.Tensor:
    shares = file.product(f"{block}.ffn_gate_inp", inputs).softmax(-1)
    weights, chosen = shares.topk(int(file.key("expert_used_count")), -1)
    if file.architecture.weights_sum_to_one:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=_LEAST_WEIGHT)
    gates, ups, downs = (file[f"{block}.ffn_{name}_exps.weight"] for name in ("gate", "up", "down"))
    outputs = torch.zeros_like(inputs)
    for expert in sorted(set(chosen.flatten().tolist())):
        tokens, place = (chosen == expert).nonzero(as_tuple=True)
        gate, up = inputs[tokens] @ gates[expert].T, inputs[tokens] @ ups[expert].T
        outputs[tokens] += weights[tokens, place, None] * ((_activated(file, gate) * up) @ downs[expert].T)
    return outputs
