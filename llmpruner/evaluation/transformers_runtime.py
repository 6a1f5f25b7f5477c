"""The built-in runtime: transformers, step by step, with a key/value cache. Imports torch when a model is opened."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from .runtime import BenchSubject, Runtime, Session, Work

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..structure.coupling import CouplingGraph


class TorchSession(Session):
    """A model in memory, step by step, with a cache that grows."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.model = model

    def start(self, batch: int, length: int) -> None:
        from ..models.generation import CachedModel

        del batch, length
        self._cached = CachedModel(self.model)

    def prefill(self, tokens: torch.Tensor) -> None:
        self._logits = self._cached.process(tokens)

    def decode(self, count: int) -> None:
        for _ in range(count):
            self._logits = self._cached.process(self._logits.argmax(-1, keepdim=True))

    def milliseconds(self, step: Callable[[], None]) -> float:
        self._wait()
        begin = time.perf_counter()
        step()
        self._wait()
        return (time.perf_counter() - begin) * 1e3

    def _wait(self) -> None:
        import torch

        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def close(self) -> None:
        del self.model
        vars(self).pop("_cached", None)


class TransformersRuntime(Runtime):
    """Each step calls the model from Python, with a cache that grows."""

    name = "transformers"
    summary = "transformers, step by step, with a cache that grows"

    def check(self, subject: BenchSubject) -> None:
        from ..models.positions import check_table

        what = f"{subject.length:,} tokens"
        check_table(subject.structure.config, subject.length, what, "lower --prompt or --new", f"'{subject.ref}'")

    def open(self, subject: BenchSubject) -> tuple[Session, Work]:
        loaded = subject.load()
        return TorchSession(loaded.model), work_of(loaded.model, loaded.graph)


def work_of(model: PreTrainedModel, graph: CouplingGraph) -> Work:
    """What the steps of ``model`` cost. ``graph``: its coupling graph (after a cut, of the cut one)."""
    from ..models.meta import macs_per_token, multiplied
    from ..models.numbers import stored_bytes
    from ..pruning.kv_cache import bytes_per_token

    whole = macs_per_token(model, graph, context=0)
    head: Any = model.get_output_embeddings()
    head_macs = 0 if head is None else int(head.weight.numel())
    weights, routed = 0, Counter[float]()
    for _, parameter, experts in multiplied(model):
        if experts is None:
            weights += stored_bytes(parameter)
        else:
            routed[experts / parameter.shape[0]] += stored_bytes(parameter)
    try:
        cached = sum(bytes_per_token(model, graph))
    except UnsupportedModelError:
        cached = None
    return Work(
        body_macs=whole - head_macs,
        head_macs=head_macs,
        pair_macs=macs_per_token(model, graph, context=1) - whole,
        weight_bytes=weights,
        routed_bytes=dict(routed),
        cache_bytes=cached,
    )
