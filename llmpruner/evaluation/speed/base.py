"""Runtime: a program that runs models, whose speed ``llmpruner bench`` measures. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from ...component import Component
from .work import Work

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from ...structure.coupling import CouplingGraph


class BenchStructure(Protocol):
    """A model without its weights. ``graph``: after all cuts."""

    @property
    def config(self) -> PreTrainedConfig: ...

    @property
    def graph(self) -> CouplingGraph: ...


class BenchModel(BenchStructure, Protocol):
    """The same, loaded by transformers."""

    @property
    def model(self) -> PreTrainedModel: ...


@dataclass(frozen=True)
class BenchSubject:
    """A model to measure. ``ref``: as the user gave it. ``path``: of local files, else None. ``device``: to run on, as
    torch names it. ``batch``, ``length``: the largest number of sequences, and of tokens in each, prompt and
    continuation together. ``find``, ``find_dtype``, ``load``:
    called when `structure`, `dtype` or `loaded` is first read, so that a runtime which loads models by itself needs
    none of them."""

    ref: str
    path: Path | None
    device: str
    batch: int
    length: int
    find: Callable[[], BenchStructure]
    find_dtype: Callable[[], torch.dtype]
    load: Callable[[], BenchModel]

    @cached_property
    def structure(self) -> BenchStructure:
        """The model without its weights: its ``config``, and in ``graph`` its coupled groups after all cuts."""
        return self.find()

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the weights in memory."""
        return self.find_dtype()

    @cached_property
    def loaded(self) -> BenchModel:
        """The same with its ``model``, of transformers, in evaluation mode."""
        return self.load()


class Session:
    """One model, ready to run. ``vocabulary``: its number of tokens. ``dtype``: of its weights, as the result names
    it.

    ::

        class SlowSession(Session):
            def __init__(self, model):
                self.model, self.vocabulary = model, model.config.vocab_size
                self.dtype = str(model.dtype).removeprefix("torch.")

            def prefill(self, tokens):
                self.tokens = tokens.to(self.model.device)
                self.decode(1)

            def decode(self, count):
                with torch.no_grad():
                    for _ in range(count):
                        logits = self.model(self.tokens, use_cache=False).logits
                        self.tokens = torch.cat([self.tokens, logits[:, -1:].argmax(-1)], dim=1)
    """

    vocabulary: int
    dtype: str

    def start(self, batch: int, length: int) -> None:
        """Prepare an empty cache for ``batch`` sequences of up to ``length`` tokens. Not timed."""

    def prefill(self, tokens: torch.Tensor) -> None:
        """Process ``tokens``, ids of shape (batch, length), int64 on the CPU, and predict the next ones."""
        raise NotImplementedError

    def decode(self, count: int) -> None:
        """Add ``count`` tokens to every sequence, the likeliest one each time."""
        raise NotImplementedError

    def milliseconds(self, step: Callable[[], None]) -> float:
        """The time that ``step``, a prefill or decoding, takes until its results are there; by default until it
        returns."""
        begin = time.perf_counter()
        step()
        return (time.perf_counter() - begin) * 1e3

    def close(self) -> None:
        """Free the model."""


class Runtime(Component):
    """Runs models in one program.

    ::

        class Slow(Runtime):
            name = "slow"
            summary = "transformers without a cache"

            def check(self, subject):
                return 4 * subject.structure.graph.total_parameters

            def open(self, subject):
                loaded = subject.loaded
                return SlowSession(loaded.model), work_of(loaded.model, loaded.graph)
    """

    kind: ClassVar[str] = "runtime"
    through_transformers: ClassVar[bool] = True
    """Whether `BenchSubject.loaded` or its dtype is used, so that the options by which models are opened apply."""

    def check(self, subject: BenchSubject) -> int:
        """The bytes of memory that the model takes, before anything is loaded. Raises `MissingExtraError` or
        `ModelError` when the runtime is not installed, or cannot run the model or its length."""
        raise NotImplementedError

    def open(self, subject: BenchSubject) -> tuple[Session, Work]:
        """Load the model; returns it with what its steps cost. All models of a run are open at the same time."""
        raise NotImplementedError
