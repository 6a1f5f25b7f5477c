"""GGUF files that llama.cpp runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
import torch

from ...errors import ModelError
from ..runtime import Session

if TYPE_CHECKING:
    from collections.abc import Sequence


class LlamaCppSession(Session):
    """Through llama.cpp's C interface, as the Python class of llama-cpp-python runs one sequence at a time."""

    def __init__(self, path: Path, dtype: str, *, batch: int, length: int, device: str) -> None:
        self.dtype = dtype
        llama_cpp.llama_log_set(_SILENT, None)
        llama_cpp.llama_backend_init()
        of_model = llama_cpp.llama_model_default_params()
        of_model.n_gpu_layers = 0 if device == "cpu" else -1
        self._model: Any = llama_cpp.llama_model_load_from_file(str(path).encode(), of_model)
        if not self._model:
            raise ModelError(f"llama.cpp cannot load '{path}'")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = batch * length
        options.n_batch = options.n_ubatch = batch * length
        options.n_seq_max = batch
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.offload_kqv = device != "cpu"
        self._context: Any = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise ModelError(f"llama.cpp has no memory for {batch} sequences of {length} tokens with '{path}'")
        self._tokens = llama_cpp.llama_batch_init(batch * length, 0, 1)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def start(self, batch: int, length: int) -> None:
        del length
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._place = 0
        self._outputs = [0] * batch

    def prefill(self, tokens: torch.Tensor) -> None:
        self._process(tokens.tolist())

    def decode(self, count: int) -> None:
        for _ in range(count):
            self._process([[self._likeliest(output)] for output in self._outputs])

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._tokens)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def _process(self, sequences: Sequence[Sequence[int]]) -> None:
        batch, filled = self._tokens, 0
        for number, tokens in enumerate(sequences):
            for offset, token in enumerate(tokens):
                batch.token[filled] = token
                batch.pos[filled] = self._place + offset
                batch.n_seq_id[filled] = 1
                batch.seq_id[filled][0] = number
                batch.logits[filled] = offset == len(tokens) - 1
                filled += 1
            self._outputs[number] = filled - 1
        batch.n_tokens = filled
        self._place += len(sequences[0])
        if llama_cpp.llama_decode(self._context, batch):
            raise ModelError("llama.cpp cannot process the tokens: its cache is full")
        # A device may still compute when the call returns.
        llama_cpp.llama_synchronize(self._context)

    def _likeliest(self, output: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, output)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self.vocabulary,))))


def _say_nothing(level: int, text: bytes, data: Any) -> None:
    del level, text, data


_SILENT = llama_cpp.llama_log_callback(_say_nothing)
"""llama.cpp keeps the address of what it logs to."""
