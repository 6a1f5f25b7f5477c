"""Writing a GGUF file, with one tensor in memory besides the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch

from ...errors import UnsupportedModelError
from ...progress import Progress
from .architectures import GgufArchitecture
from .plan import GgufPlan
from .source import Entry, decoder_of, entries, layer_and_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TYPES = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_ROUTER = "ffn_gate_inp"


def write_gguf(
    model: PreTrainedModel,
    plan: GgufPlan,
    path: Path,
    dtype: torch.dtype,
    describe: Callable[[gguf.GGUFWriter], None],
    progress: Progress,
) -> None:
    """Write ``model`` to ``path``. ``dtype``: of matrices; vectors and routers are float32. ``describe``: adds name
    and tokenizer.

    Raises `UnsupportedModelError` for weights that are too large for ``dtype``.
    """
    writer = gguf.GGUFWriter(path, plan.architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    describe(writer)
    _add_sizes(writer, plan)
    _add_rope(writer, plan)
    writer.add_file_type(TYPES[dtype][1])
    tensors = list(_tensors(model, plan, dtype))
    for name, shape, stored, _ in tensors:
        size = int(np.prod(shape)) * stored.itemsize
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=TYPES[stored][0])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, _, stored, read in progress.track(tensors, "Writing tensors"):
            writer.write_tensor_data(_array(name, read(), stored))
    finally:
        writer.close()


def _add_sizes(writer: gguf.GGUFWriter, plan: GgufPlan) -> None:
    architecture, sizes, computation = plan.architecture, plan.sizes, plan.computation
    writer.add_block_count(sizes.layers)
    writer.add_context_length(plan.context)
    writer.add_embedding_length(sizes.hidden)
    writer.add_vocab_size(sizes.vocabulary)
    for add, values in (
        (writer.add_feed_forward_length, sizes.widths),
        (writer.add_head_count, sizes.heads),
        (writer.add_head_count_kv, sizes.kv_heads),
    ):
        add(list(values) if architecture.per_layer else values[0])
    writer.add_key_length(sizes.head_size)
    writer.add_value_length(sizes.head_size)
    writer.add_rope_dimension_count(sizes.head_size)
    writer.add_layer_norm_rms_eps(computation.epsilon)
    if any(sizes.experts):
        writer.add_expert_count(sizes.experts[0])
        writer.add_expert_used_count(computation.active_experts)
        writer.add_expert_feed_forward_length(sizes.widths[0])
    if computation.attention_cap is not None:
        writer.add_attn_logit_softcapping(computation.attention_cap)
    if computation.output_cap is not None:
        writer.add_final_logit_softcapping(computation.output_cap)
    if architecture.window_period and plan.window is not None:
        writer.add_sliding_window(plan.window)
        writer.add_sliding_window_pattern([w is not None for w in computation.windows])


def _add_rope(writer: gguf.GGUFWriter, plan: GgufPlan) -> None:
    rope = plan.rope
    writer.add_rope_freq_base(rope["rope_theta"])
    sliding = plan.computation.rope.get("sliding_attention")
    if sliding is not None:
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(plan.yarn_factor)


def _tensors(
    model: PreTrainedModel, plan: GgufPlan, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, Callable[[], torch.Tensor]]]:
    """Name, shape, stored type and values of every tensor."""
    found = entries(model, plan.architecture)
    if plan.rope.get("rope_type") == "llama3":
        name = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight"
        found[name] = Entry((plan.sizes.head_size // 2,), lambda: _rope_factors(model, plan))
    for name, entry in found.items():
        is_vector = len(entry.shape) == 1 or layer_and_part(name)[1] == _ROUTER
        stored = torch.float32 if is_vector else dtype
        yield name, entry.shape, stored, lambda name=name, entry=entry: _values(name, entry, plan)  # type: ignore[misc]


def _rope_factors(model: PreTrainedModel, plan: GgufPlan) -> torch.Tensor:
    """What the rotary frequencies of the base are divided by: (head size / 2,)."""
    frequencies = decoder_of(model).rotary_emb.inv_freq.float().cpu()
    exponents = torch.arange(0, plan.sizes.head_size, 2, dtype=torch.float32) / plan.sizes.head_size
    return torch.as_tensor(plan.rope["rope_theta"] ** -exponents / frequencies)


def _values(name: str, entry: Entry, plan: GgufPlan) -> torch.Tensor:
    """The values to store, for the order of rotary channels, the norms, and the scale of attention of llama.cpp."""
    tensor = entry.read().cpu()
    layer, part = layer_and_part(name)
    if plan.architecture.scaled_embedding and part.endswith("_norm"):
        tensor = tensor.float() + 1
    if layer is not None and part in ("attn_q", "attn_k") and plan.architecture.interleaved:
        heads = (plan.sizes.heads if part == "attn_q" else plan.sizes.kv_heads)[layer]
        tensor = interleaved(tensor, heads)
    if part == _scaled_part(plan.architecture) and abs(plan.query_factor - 1) > 1e-6:
        tensor = tensor.float() * plan.query_factor
    return tensor


def _scaled_part(architecture: GgufArchitecture) -> str:
    """The last tensor that queries go through: their norm where there is one."""
    has_norm = gguf.MODEL_TENSOR.ATTN_Q_NORM in gguf.MODEL_TENSORS[_key(architecture)]
    return "attn_q_norm" if has_norm else "attn_q"


def _key(architecture: GgufArchitecture) -> gguf.MODEL_ARCH:
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)


def interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads × size, …) with the channels i and i + size / 2 of each head beside each other."""
    halves = tensor.view(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _array(name: str, tensor: torch.Tensor, stored: torch.dtype) -> np.ndarray:
    converted = tensor.to(stored).contiguous()
    if not bool(torch.isfinite(converted).all()):
        raise UnsupportedModelError(
            f"{name} has values that are too large for {str(stored).removeprefix('torch.')}; use --set gguf.type=f32"
        )
    return converted.view(torch.int16).numpy() if stored == torch.bfloat16 else converted.numpy()
