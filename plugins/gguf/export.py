"""Export as GGUF: write, quantise with llama.cpp, compare its logits and tokens with those of the source."""

from __future__ import annotations

from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import torch

from llmpruner import CheckpointError, ExportTask

from .vocabulary import RECORDED_PRE, stop_texts
from .write import TYPES, write_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCES = {"f32": 1e-2, "f16": 2e-2, "bf16": 1e-1, "q8_0": 1e-1}
"""Of the norm of a position's centred logits, by type of file; llama.cpp looks GELU up in a table of float16. Unrelated
logits have an error of about 1.4; types of fewer bits may have 0.7."""
TEXT = (
    "Hello world! It's 3 o'clock, isn't it?  Two  blanks,\na new line,\n\n\ttabs; 12345 numbers 3.14, "
    "naïve café, 你好世界, привет мир, 🙂 (and so on) -- a_b = c[0] / d;"
)


def export_gguf(task: ExportTask, kind: str, quant: str | None, pre: str | None) -> str:
    """Write a GGUF file and a ``Modelfile`` by `GgufExporter.Settings`; returns what was written and how it was
    checked."""
    model, tokenizer = task.model, task.loaded.tokenizer
    if kind == "auto":
        kind = next((name for name, (dtype, *_) in TYPES.items() if dtype == model.dtype), "f32")
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
        counts = Counter(tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(target).tensors)
        # Rows that do not fill the blocks of a type get one of more bits.
        kind = f"{quant}: " + ", ".join(f"{count} {name}" for name, count in counts.most_common() if name != "f32")
    # Ollama's description of a model; it takes the chat template from the file.
    stops = [f'PARAMETER stop "{t}"\n' for t in stop_texts(tokenizer, model.generation_config) if '"' not in t]
    (task.directory / "Modelfile").write_text(f"FROM ./{target.name}\n{''.join(stops)}", encoding="utf-8")
    size = f"{target.stat().st_size / 1e6:,.1f} MB"
    return f"{target.name} ({architecture}, {kind}, {size}): {checked}; llama-cli -m {target.name} runs it"


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
    """Without this, llama.cpp prints hundreds of lines on standard error. It may log at any time: the cache keeps what
    it calls."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    return silent
