"""Runtime: a program that runs models, whose speed ``llmpruner bench`` measures; and the built-in one, transformers.
Imports torch when a model is opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component
from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..discovery.opening import Opener, Source
    from ..models.model import Model, Structure
    from ..structure.coupling import CouplingGraph


@dataclass(frozen=True)
class BenchSubject:
    """A model to measure. ``ref``: as the user gave it. ``path``: of local files, else None. ``batch``, ``length``: the
    largest number of sequences, and of tokens in each, prompt and continuation together. The model is opened when
    `structure` is first read, so that a runtime which loads models by itself does not need it."""

    ref: str
    path: Path | None
    batch: int
    length: int
    source: Source
    opener: Opener

    @property
    def device(self) -> str:
        """To run on, as torch names it."""
        return self.opener.load.device

    @cached_property
    def structure(self) -> Structure:
        """The model without its weights: its ``config``, and in ``graph`` its coupled groups after all cuts."""
        return self.opener.structure(self.source)

    def load(self) -> Model:
        """The same with its ``model``, of transformers, in evaluation mode."""
        return self.opener.weights(self.structure)


@dataclass(frozen=True)
class Work:
    """What the steps of one model cost, from its sizes: what its speed could be.

    ``body_macs``: multiply-accumulate operations per token of all weights but the head's. ``head_macs``: of the head
    per predicted token. ``pair_macs``: of attention for each token that a token reads. ``weight_bytes``: bytes of the
    weights that every step reads, the head included and the embedding not. ``routed_bytes``: share of experts that a
    token is routed to → bytes of all experts. ``cache_bytes``: of the key/value cache per token; None where they are
    not known.
    """

    body_macs: int
    head_macs: int
    pair_macs: int
    weight_bytes: int
    routed_bytes: Mapping[float, int] = field(default_factory=dict)
    cache_bytes: int | None = None

    def prefill(self, tokens: int) -> int:
        """Multiply-accumulate operations to process a sequence of ``tokens`` and to predict one more."""
        return self.body_macs * tokens + self.head_macs + self.pair_macs * tokens * (tokens + 1) // 2

    def decode(self, batch: int, context: float) -> float | None:
        """Bytes that a step for ``batch`` sequences of ``context`` tokens reads: weights once, of experts those that a
        sequence is routed to (if they are drawn evenly), and the cache of every sequence. None where the cache is not
        known."""
        if self.cache_bytes is None:
            return None
        experts = sum(size * (1 - (1 - share) ** batch) for share, size in self.routed_bytes.items())
        return self.weight_bytes + experts + batch * context * self.cache_bytes


class Session:
    """One model, ready to run. ``vocabulary``: its number of tokens. ``dtype``: of its weights, as the result names it.
    `prefill` and `decode` are timed, and return once their results are there.

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

    def start(self) -> None:
        """Forget all tokens. Not timed."""

    def prefill(self, tokens: torch.Tensor) -> None:
        """Process ``tokens``, ids of shape (batch, length), int64 on the CPU, and predict the next ones."""
        raise NotImplementedError

    def decode(self, count: int) -> None:
        """Add ``count`` tokens to every sequence, the likeliest one each time."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the model."""


class Runtime(Component):
    """Runs models in one program.

    ::

        class Slow(Runtime):
            name = "slow"
            summary = "transformers without a cache"

            def open(self, subject):
                loaded = subject.load()
                return SlowSession(loaded.model), work_of(loaded.model, loaded.graph)
    """

    kind: ClassVar[str] = "runtime"

    def check(self, subject: BenchSubject) -> None:
        """Raise `MissingExtraError` or `ModelError` when the runtime is not installed, or cannot run the model or its
        length, before anything is loaded. Checks nothing by default."""

    def open(self, subject: BenchSubject) -> tuple[Session, Work]:
        """Load the model; returns it with what its steps cost. All models of a run are open at the same time."""
        raise NotImplementedError


class TorchSession(Session):
    def __init__(self, model: PreTrainedModel) -> None:
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.model = model

    def start(self) -> None:
        from ..models.generation import CachedModel

        self._cached = CachedModel(self.model)

    def prefill(self, tokens: torch.Tensor) -> None:
        self._logits = self._cached.process(tokens)
        self._wait()

    def decode(self, count: int) -> None:
        for _ in range(count):
            self._logits = self._cached.process(self._logits.argmax(-1, keepdim=True))
        self._wait()

    def _wait(self) -> None:
        import torch

        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def close(self) -> None:
        vars(self).clear()


class TransformersRuntime(Runtime):
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
