"""Export as GGUF: write, quantise, compare llama.cpp's logits and tokens with those of the source."""

from __future__ import annotations

import logging
import math
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch

from llmpruner import CheckpointError, ExportTask, UnsupportedModelError

from . import OWN
from .model import KEYS, Architecture, Facts, described, layer_and_part
from .vocabulary import RECORDED_PRE, add_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOG = logging.getLogger("llmpruner")

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BLOCK, SUPER_BLOCK = 32, 256
"""Weights of a row that share scales, in the types of `OWN`, and in k-quants; other rows get types of more bits."""
TOLERANCES = {"f32": 1e-2, "f16": 2e-2, "bf16": 1e-1, "q8_0": 1e-1}
"""Of the norm of a position's centred logits, by type of file; llama.cpp looks GELU up in a table of float16. Unrelated
logits have an error of about 1.4; types of fewer bits may have 0.7."""
TEXT = (
    "Hello world! It's 3 o'clock, isn't it?  Two  blanks,\na new line,\n\n\ttabs; 12345 numbers 3.14, "
    "naïve café, 你好世界, привет мир, 🙂 (and so on) -- a_b = c[0] / d;"
)


def export_gguf(task: ExportTask, kind: str, quant: str | None, pre: str | None) -> str:
    """Write a GGUF file and a ``Modelfile``; returns what was written and how it was checked."""
    model, tokenizer = task.model, task.loaded.tokenizer
    if quant in OWN:
        kind, quant = quant, None
    elif kind == "auto":
        kind = next((name for name, dtype in FLOATS.items() if dtype == model.dtype), "f32")
    target = task.directory / f"{task.name}.gguf"
    written = target if quant is None else task.directory / f"{task.name}-{kind}.gguf"
    architecture, pre = write_gguf(task, written, kind, pre)
    checked = "read back; install llama-cpp-python to compare logits"
    if find_spec("llama_cpp"):
        task.progress.status("Comparing llama.cpp's logits with the model's")
        checked = "verified by llama.cpp's logits"
        check_logits(model, written, kind)
        # A tokenizer that transformers read from a GGUF file has lost how it splits text.
        if tokenizer is not None and RECORDED_PRE not in tokenizer.init_kwargs:
            check_tokens(tokenizer, pre, written)
    if quant is not None:
        task.progress.status(f"Quantising to {quant}")
        quantise(written, target, quant)
        written.unlink()
        check_logits(model, target, quant)
        kind = quant
    if kind not in FLOATS:
        kind = types_of(target, kind)
    # Ollama's description of a model; it takes the chat template from the file.
    end = getattr(model.generation_config, "eos_token_id", None)
    texts: list[str] = []
    if tokenizer is not None:
        ids = [*(end if isinstance(end, list) else [end]), tokenizer.eos_token_id]
        texts = [tokenizer.convert_ids_to_tokens(number) for number in dict.fromkeys(ids) if number is not None]
    stops = [f'PARAMETER stop "{text}"\n' for text in texts if '"' not in text]
    (task.directory / "Modelfile").write_text(f"FROM ./{target.name}\n{''.join(stops)}", encoding="utf-8")
    size = f"{target.stat().st_size / 1e6:,.1f} MB"
    return f"{target.name} ({architecture}, {kind}, {size}): {checked}; llama-cli -m {target.name} runs it"


def types_of(file: Path, quant: str) -> str:
    """``q4_k_m: 120 q4_k, 25 q6_k, 4.9 bits per weight``. Warns where most rows don't fill the blocks of ``quant``."""
    tensors = gguf.GGUFReader(file).tensors
    counts = Counter(tensor.tensor_type.name.lower() for tensor in tensors)
    types = ", ".join(f"{count} {name}" for name, count in counts.most_common() if name != "f32")
    bits = 8 * sum(int(tensor.n_bytes) for tensor in tensors) / sum(int(tensor.n_elements) for tensor in tensors)
    block = BLOCK if quant in (*OWN, "iq4_nl") else SUPER_BLOCK
    rows = [int(tensor.shape[0]) for tensor in tensors if len(tensor.shape) > 1]
    if 2 * len(odd := [row for row in rows if row % block]) > len(rows):
        _LOG.warning(
            "%d of %d matrices have rows of %s weights, no multiples of %d, and get types of more bits than %s",
            len(odd), len(rows), " and ".join(f"{row:,}" for row in sorted(set(odd))), block, quant,
        )  # fmt: skip
    return f"{quant}: {types}, {bits:.2f} bits per weight"


def write_gguf(task: ExportTask, path: Path, kind: str, pre: str | None) -> tuple[str, str | None]:
    """Write the model to ``path``, one tensor at a time, and read all back; returns the names of architecture and
    pre-tokenizer. ``kind``: type of matrices, of `FLOATS` or `OWN`; vectors and routers are float32, and of quantised
    files, embedding and head q8_0. ``pre``: see `add_tokenizer`. Raises `UnsupportedModelError` for a model that no
    architecture states, and for weights too large for ``kind``."""
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
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if kind == 'f32' else 'MOSTLY'}_{kind.upper()}"])
    if kind not in FLOATS:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kinds = {}
    for name, tensor in tensors.items():
        layer, part = layer_and_part(name)
        kinds[name] = "f32" if tensor.ndim == 1 or part == "ffn_gate_inp" else kind
        if kinds[name] in OWN:
            of_tokens = "q8_0" if layer is None else kind
            kinds[name] = of_tokens if tensor.shape[-1] % BLOCK == 0 else "f16"
        stored = gguf.GGMLQuantizationType[kinds[name].upper()]
        size = math.prod(gguf.quant_shape_to_byte_shape(tuple(tensor.shape), stored))
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), size, raw_dtype=stored)

    def values(name: str) -> np.ndarray:
        dtype = FLOATS.get(kinds[name], torch.float16)  # in which blocks have their scales
        tensor = _for_llama_cpp(name, tensors[name], architecture, facts).cpu()
        rounded = tensor.to(dtype).contiguous()
        if not bool(torch.isfinite(rounded).all()):
            raise UnsupportedModelError(
                f"{name} has values that are too large for {str(dtype).removeprefix('torch.')}; use --set gguf.type=f32"
            )
        if kinds[name] in OWN:
            return np.asarray(gguf.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[kinds[name].upper()]))
        return rounded.view(torch.int16).numpy() if dtype == torch.bfloat16 else rounded.numpy()

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
    length = facts.context if not window or architecture.window_period else min(facts.context, window)
    writer.add_context_length(length)
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


def quantise(source: Path, target: Path, quant: str) -> None:
    """Write ``source``, a file with float tensors, as ``quant`` to ``target``. Raises `CheckpointError`."""
    import llama_cpp

    be_quiet()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = int(gguf.LlamaFileType[f"MOSTLY_{quant.upper()}"])
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options)
    if status != 0 or not target.is_file():
        raise CheckpointError(f"llama.cpp could not quantise {source.name} to {quant} (status {status})")


def check_logits(model: PreTrainedModel, path: Path, kind: str) -> None:
    """Raise `CheckpointError` unless llama.cpp gives the logits of ``model``. ``kind``: the type of the file."""
    if model.dtype == torch.float16 and model.device.type == "cpu":
        model = model.float()  # in which a CPU computes
    config = model.config.get_text_config()
    # Random tokens: a model that repeats its input would hide mistakes in attention.
    length, generator = min(32, config.max_position_embeddings), torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.get_input_embeddings().weight.shape[0], (length,), generator=generator)
    with torch.no_grad():
        expected = model(ids[None].to(model.device), use_cache=False).logits[0].float().cpu()
    f32 = int(gguf.GGMLQuantizationType.F32)
    llama = _opened(path, logits_all=True, n_ctx=256, n_batch=256, type_k=f32, type_v=f32)
    llama.eval(ids.tolist())
    logits = torch.from_numpy(llama.scores[:length].copy())
    llama.close()
    errors = relative_errors(expected, logits)
    tolerance = max(TOLERANCES.get(kind, 0.7), TOLERANCES["f32" if model.dtype == torch.float32 else "bf16"])
    # Rounding to fewer bits may send a token to other experts, which changes single positions much.
    error = float(errors.max() if tolerance == TOLERANCES["f32"] else errors.median())
    if not error <= tolerance:
        raise CheckpointError(
            f"llama.cpp with {path.name} gives other logits than the model: relative error {error:.3g} ({tolerance:g})"
        )


def relative_errors(expected: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """For each position, the norm of the difference, as a share of the norm of the centred logits: (T,)."""
    centred = expected - expected.mean(-1, keepdim=True)
    return torch.as_tensor((logits - expected).norm(dim=-1) / centred.norm(dim=-1).clamp(min=1e-6))


def check_tokens(tokenizer: Any, pre: str | None, path: Path) -> None:
    """Raise `CheckpointError` unless llama.cpp splits a text into the tokens of ``tokenizer``."""
    expected = tokenizer(TEXT)["input_ids"]
    llama = _opened(path, vocab_only=True)
    tokens = [int(token) for token in llama.tokenize(TEXT.encode(), add_bos=True, special=False)]
    llama.close()
    if tokens != expected:
        raise CheckpointError(
            f"llama.cpp splits text into other tokens than the tokenizer; if '{pre}' is the wrong name for how it "
            "splits text, give the right name: --set gguf.pre=NAME"
        )


def _opened(path: Path, **options: Any) -> Any:
    import llama_cpp

    be_quiet()
    try:
        return llama_cpp.Llama(str(path), verbose=False, n_gpu_layers=0, **options)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise CheckpointError(f"llama.cpp does not load {path.name}: {error}") from error


@cache
def be_quiet() -> Any:
    """Keep llama.cpp from printing hundreds of lines. It may log at any time: the cache keeps what it calls."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    return silent
