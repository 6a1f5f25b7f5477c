"""llama.cpp itself, through llama-cpp-python: quantising, logits and tokens."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import torch

from ...errors import CheckpointError, MissingExtraError

PACKAGE, EXTRA = "llama-cpp-python", "llama-cpp"
_F32 = int(gguf.GGMLQuantizationType.F32)
_CONTEXT = 256


def is_installed() -> bool:
    return find_spec("llama_cpp") is not None


def check_installed() -> None:
    """Raise `MissingExtraError` unless llama-cpp-python is installed."""
    if not is_installed():
        raise MissingExtraError(PACKAGE, EXTRA)


def block_of(quant: str) -> int:
    """How many values of a row a type quantises together; rows must be a multiple of it."""
    return 256 if "_k" in quant or quant == "iq4_xs" else 32


def quantize(source: Path, target: Path, quant: str) -> None:
    """Write ``source``, a file with float tensors, as ``quant`` to ``target``. Raises `CheckpointError`."""
    import llama_cpp

    _be_quiet()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(gguf.LlamaFileType[f"MOSTLY_{quant.upper()}"])
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    if status != 0 or not target.is_file():
        raise CheckpointError(f"llama.cpp could not quantise {source.name} to {quant} (status {status})")


def runtime_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of llama.cpp on the CPU for the token numbers ``ids`` (T,), at most 256, with a float32 cache.

    Raises `CheckpointError` for a file that it does not load.
    """
    model = _opened(path, logits_all=True, n_ctx=_CONTEXT, n_batch=_CONTEXT, type_k=_F32, type_v=_F32)
    try:
        model.eval(ids.tolist())
        return torch.from_numpy(model.scores[: len(ids)].copy())
    finally:
        model.close()


def runtime_tokens(path: Path, text: str) -> list[int]:
    """The tokens of ``text``, with the special tokens that are to be added according to the file."""
    model = _opened(path, vocab_only=True)
    try:
        return [int(token) for token in model.tokenize(text.encode(), add_bos=True, special=False)]
    finally:
        model.close()


def _opened(path: Path, **options: Any) -> Any:
    import llama_cpp

    _be_quiet()
    try:
        return llama_cpp.Llama(str(path), verbose=False, n_gpu_layers=0, **options)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise CheckpointError(f"llama.cpp does not load {path.name}: {error}") from error


def _be_quiet() -> None:
    """Without this, llama.cpp prints hundreds of lines on standard error."""
    import ctypes

    import llama_cpp

    llama_cpp.llama_log_set(_ignore(llama_cpp), ctypes.c_void_p(0))


def _ignore(llama_cpp: Any) -> Any:
    """A log function that does nothing; kept on the module, as llama.cpp may call it at any time."""
    if not hasattr(_ignore, "callback"):
        _ignore.callback = llama_cpp.llama_log_callback(lambda level, text, data: None)  # type: ignore[attr-defined]
    return _ignore.callback  # type: ignore[attr-defined]
