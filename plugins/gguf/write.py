"""Writing a GGUF file, with one tensor in memory besides the model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch

from llmpruner import CheckpointError, ExportTask, UnsupportedModelError

from .model import KEYS, Architecture, Facts, described, layer_and_part
from .vocabulary import add_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TYPES = {
    "f32": (torch.float32, gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (torch.float16, gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (torch.bfloat16, gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


def write_gguf(task: ExportTask, path: Path, kind: str, pre: str | None) -> tuple[str, str | None]:
    """Write the model to ``path``, and read every tensor back; returns the names of the architecture and of the
    pre-tokenizer. ``kind``: type of matrices; vectors and routers are float32. ``pre``: see `add_tokenizer`.

    Raises `UnsupportedModelError` for a model that no architecture states, and for weights too large for ``kind``.
    """
    model = task.model
    architecture, tensors, facts = described(model)
    if facts.rope.get("rope_type") == "llama3":
        tensors[gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight"] = _rope_factors(model, facts)
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(task.name)
    pre = add_tokenizer(writer, task.loaded.tokenizer, facts.vocabulary, pre)
    _add_sizes(writer, architecture, facts)
    _add_rope(writer, facts)
    writer.add_file_type(TYPES[kind][2])
    kinds = {}
    for name, tensor in tensors.items():
        is_vector = tensor.ndim == 1 or layer_and_part(name)[1] == "ffn_gate_inp"
        kinds[name] = "f32" if is_vector else kind
        dtype, stored, _ = TYPES[kinds[name]]
        size = tensor.numel() * dtype.itemsize
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), size, raw_dtype=stored)

    def values(name: str) -> np.ndarray:
        return _array(name, _for_llama_cpp(name, tensors[name], architecture, facts), kinds[name])

    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in task.progress.track(list(tensors), "Writing tensors"):
            writer.write_tensor_data(values(name))
    finally:
        writer.close()
    for written in gguf.GGUFReader(path).tensors:
        if written.data.tobytes() != values(written.name).tobytes():
            raise CheckpointError(f"{path.name}: {written.name} has other values than were written; check the disk")
    return architecture.name, pre


def _add_sizes(writer: gguf.GGUFWriter, architecture: Architecture, facts: Facts) -> None:
    window = next((w for w in facts.windows if w is not None), None)
    # Inside its window, a layer attends to all tokens before.
    cut_short = window is not None and not architecture.window_period
    writer.add_context_length(min(facts.context, window) if cut_short and window else facts.context)
    writer.add_block_count(len(facts.heads))
    writer.add_embedding_length(facts.hidden)
    writer.add_vocab_size(facts.vocabulary)
    for add, values in (
        (writer.add_feed_forward_length, facts.widths),
        (writer.add_head_count, facts.heads),
        (writer.add_head_count_kv, facts.kv_heads),
    ):
        add(list(values) if architecture.per_layer else values[0])
    writer.add_key_length(facts.head_size)
    writer.add_value_length(facts.head_size)
    writer.add_rope_dimension_count(facts.head_size)
    writer.add_layer_norm_rms_eps(facts.epsilon)
    if any(facts.experts):
        writer.add_expert_count(facts.experts[0])
        writer.add_expert_used_count(facts.active_experts)
        writer.add_expert_feed_forward_length(facts.widths[0])
    if facts.attention_cap is not None:
        writer.add_attn_logit_softcapping(facts.attention_cap)
    if facts.output_cap is not None:
        writer.add_final_logit_softcapping(facts.output_cap)
    if architecture.window_period and window is not None:
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern([w is not None for w in facts.windows])


def _add_rope(writer: gguf.GGUFWriter, facts: Facts) -> None:
    rope, kind = facts.rope, facts.rope.get("rope_type", "default")
    writer.add_rope_freq_base(rope["rope_theta"])
    if facts.sliding_rope is not None:
        writer.add_rope_freq_base_swa(facts.sliding_rope["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        # llama.cpp multiplies by this and by what it derives from the factor.
        writer.add_rope_scaling_attn_factors(facts.rope_scaling / (1 + 0.1 * math.log(rope["factor"])))


def _rope_factors(model: PreTrainedModel, facts: Facts) -> torch.Tensor:
    """What the rotary frequencies of the base are divided by: (head size / 2,)."""
    frequencies = model.get_decoder().rotary_emb.inv_freq.float().cpu()
    exponents = torch.arange(0, facts.head_size, 2, dtype=torch.float32) / facts.head_size
    return torch.as_tensor(facts.rope["rope_theta"] ** -exponents / frequencies)


def _for_llama_cpp(name: str, tensor: torch.Tensor, architecture: Architecture, facts: Facts) -> torch.Tensor:
    """The values for the order of rotary channels, the norms, and the scale of attention of llama.cpp."""
    layer, part = layer_and_part(name)
    if architecture.is_gemma and part.endswith("_norm"):
        tensor = tensor.float() + 1
    if layer is not None and part in ("attn_q", "attn_k") and architecture.interleaved:
        heads = (facts.heads if part == "attn_q" else facts.kv_heads)[layer]
        tensor = interleaved(tensor, heads)
    size = facts.hidden // facts.heads[0] if architecture.wide_scale_layers == len(facts.heads) else facts.head_size
    factor = facts.scale * math.sqrt(size)
    # The last tensor that queries go through: their norm if there is any.
    has_norm = gguf.MODEL_TENSOR.ATTN_Q_NORM in gguf.MODEL_TENSORS[KEYS[architecture.name]]
    if part == ("attn_q_norm" if has_norm else "attn_q") and abs(factor - 1) > 1e-6:
        tensor = tensor.float() * factor
    return tensor


def interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads × size, …) with the channels i and i + size / 2 of each head next to each other."""
    halves = tensor.view(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _array(name: str, tensor: torch.Tensor, kind: str) -> np.ndarray:
    dtype = TYPES[kind][0]
    converted = tensor.to("cpu", dtype).contiguous()
    if not bool(torch.isfinite(converted).all()):
        raise UnsupportedModelError(
            f"{name} has values that are too large for {str(dtype).removeprefix('torch.')}; use --set gguf.type=f32"
        )
    return converted.view(torch.int16).numpy() if dtype == torch.bfloat16 else converted.numpy()
