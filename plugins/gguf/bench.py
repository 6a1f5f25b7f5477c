"""GGUF files that llama.cpp runs, and what their steps cost by their metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader

from llmpruner import BenchSubject, ModelError, Session, Work

from .export import be_quiet


class LlamaCppSession(Session):
    """Through llama.cpp's C interface, as the Python class of llama-cpp-python runs one sequence at a time."""

    def __init__(self, path: Path, dtype: str, subject: BenchSubject) -> None:
        import llama_cpp

        self._api, self.dtype = llama_cpp, dtype
        be_quiet()
        batch, length = subject.batch, subject.length
        llama_cpp.llama_backend_init()
        model_options = llama_cpp.llama_model_default_params()
        model_options.n_gpu_layers = 0 if subject.device == "cpu" else -1
        self._model: Any = llama_cpp.llama_model_load_from_file(str(path).encode(), model_options)
        if not self._model:
            raise ModelError(f"llama.cpp cannot load '{path}'")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = batch * length
        options.n_seq_max = batch
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.offload_kqv = subject.device != "cpu"
        self._context: Any = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise ModelError(f"llama.cpp has no memory for {batch} sequences of {length} tokens with '{path}'")
        self._tokens = llama_cpp.llama_batch_init(batch * length, 0, 1)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def start(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._position = 0

    def prefill(self, tokens: torch.Tensor) -> None:
        self._outputs = [0] * len(tokens)
        self._process(tokens.tolist())

    def decode(self, count: int) -> None:
        for _ in range(count):
            logits = (self._api.llama_get_logits_ith(self._context, output) for output in self._outputs)
            arrays = (np.ctypeslib.as_array(each, shape=(self.vocabulary,)) for each in logits)
            self._process([[int(np.argmax(array))] for array in arrays])

    def close(self) -> None:
        self._api.llama_batch_free(self._tokens)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def _process(self, sequences: Sequence[Sequence[int]]) -> None:
        batch, filled = self._tokens, 0
        for number, tokens in enumerate(sequences):
            for offset, token in enumerate(tokens):
                batch.token[filled] = token
                batch.pos[filled] = self._position + offset
                batch.n_seq_id[filled] = 1
                batch.seq_id[filled][0] = number
                batch.logits[filled] = offset == len(tokens) - 1
                filled += 1
            self._outputs[number] = filled - 1
        batch.n_tokens = filled
        self._position += len(sequences[0])
        if self._api.llama_decode(self._context, batch):
            raise ModelError("llama.cpp cannot process the tokens: its cache is full")
        # A device may still compute when the call returns.
        self._api.llama_synchronize(self._context)


def gguf_work(path: Path) -> tuple[Work, str]:
    """What the steps of a GGUF file cost, and the type of most of its weights. Tokens are multiplied by every matrix,
    but by the embedding only if the file has no head; of stacked experts, by those that they are routed to."""
    reader = GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())

    def per_layer(key: str, layers: int) -> list[int]:
        field = reader.fields.get(f"{architecture}.{key}")
        value: Any = 0 if field is None else field.contents()
        return list(value) if isinstance(value, list) else [int(value)] * layers

    layers = per_layer("block_count", 1)[0]
    heads = per_layer("attention.head_count", layers)
    width = per_layer("embedding_length", 1)[0] // max(heads)
    keys_and_values = sum(per_layer(f"attention.{kind}_length", 1)[0] or width for kind in ("key", "value"))
    matrices = {tensor.name: tensor for tensor in reader.tensors if len(tensor.shape) > 1}
    head = matrices.get("output.weight", matrices["token_embd.weight"])
    if head.name == "output.weight":
        del matrices["token_embd.weight"]
    experts = [tensor for name, tensor in matrices.items() if name.endswith("_exps.weight")]
    # Without the key, or for a file whose experts were cut below it, a token uses all.
    count = int(experts[0].shape[-1]) if experts else 1
    used = min(per_layer("expert_used_count", 1)[0] or count, count)
    stacked, stacked_bytes = sum(int(t.n_elements) for t in experts), sum(int(t.n_bytes) for t in experts)
    sizes: Counter[GGMLQuantizationType] = Counter()
    for tensor in matrices.values():
        sizes[tensor.tensor_type] += int(tensor.n_elements)
    head_macs = int(head.n_elements)
    work = Work(
        body_macs=sizes.total() - head_macs - stacked + stacked * used // count,
        head_macs=head_macs,
        pair_macs=sum(heads) * keys_and_values,
        weight_bytes=sum(int(t.n_bytes) for t in matrices.values()) - stacked_bytes,
        routed_bytes={used / count: stacked_bytes} if experts else {},
        # In float16, llama.cpp's default.
        cache_bytes=2 * keys_and_values * sum(per_layer("attention.head_count_kv", layers)),
    )
    return work, sizes.most_common(1)[0][0].name.lower()
