"""Runtimes, which run models, and the speed of several in one of them, in turn, as other load then affects all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component
from ..errors import UnsupportedModelError
from ..progress import QUIET, Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..discovery.opening import Opener
    from ..models.model import Model, Structure
    from ..models.reference import Reference
    from ..settings import BenchSettings
    from ..structure.coupling import CouplingGraph


@dataclass(frozen=True)
class BenchSubject:
    """A model to measure. ``ref``: as the user gave it. ``path``: of local files, else None. ``batch``, ``length``: the
    largest number of sequences, and of tokens in each, prompt and continuation together."""

    ref: str
    path: Path | None
    batch: int
    length: int
    source: Reference | Structure
    opener: Opener

    @property
    def device(self) -> str:
        return str(self.opener.device)

    @cached_property
    def structure(self) -> Structure:
        """The model without its weights, opened at the first use, which a runtime that loads by itself avoids."""
        return self.opener.structure(self.source)

    def load(self) -> Model:
        """The same with its ``model``, of transformers, in evaluation mode."""
        return self.opener.weights(self.structure)


def bench_subject(source: Reference | Structure, settings: BenchSettings, opener: Opener) -> BenchSubject:
    path = None if source.path is None else Path(source.path)
    return BenchSubject(source.ref, path, max(settings.batch), max(settings.prompt) + settings.new, source, opener)


@dataclass(frozen=True)
class Work:
    """What the steps of one model cost, from its sizes. ``body_macs``: multiply-accumulate operations per token of all
    weights but the head's. ``head_macs``: of the head per predicted token. ``pair_macs``: of attention for each token
    that a token reads. ``weight_bytes``: of the weights that every step reads, with the head, without the embedding.
    ``routed_bytes``: share of experts that a token is routed to → bytes of all experts. ``cache_bytes``: of the
    key/value cache per token; None where they are not known."""

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
        """Bytes that a step for ``batch`` sequences of ``context`` tokens reads: weights once, of experts those that
        are routed to, if evenly, and the cache of every sequence. None where the cache is not known."""
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
                return SlowSession(loaded.network), work_of(loaded.network, loaded.graph)
    """

    kind: ClassVar[str] = "runtime"
    hook: ClassVar[str] = "llmpruner_runtimes"

    def check(self, subject: BenchSubject) -> None:
        """Raise `MissingExtraError` or `ModelError` before anything is loaded. Checks nothing by default."""

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
        from ..models.devices import synchronize

        synchronize(self.model.device)

    def close(self) -> None:
        vars(self).clear()


class TransformersRuntime(Runtime):
    name = "transformers"
    summary = "transformers, step by step, with a cache that grows"

    def check(self, subject: BenchSubject) -> None:
        from ..models.generation import check_table

        length, config = subject.length, subject.structure.config
        check_table(config, length, f"{length:,} tokens", "lower --prompt or --new", f"'{subject.ref}'")

    def open(self, subject: BenchSubject) -> tuple[Session, Work]:
        loaded = subject.load()
        return TorchSession(loaded.network), work_of(loaded.network, loaded.graph)


def work_of(model: PreTrainedModel, graph: CouplingGraph) -> Work:
    """What the steps of ``model`` cost. ``graph``: its coupling graph (after a cut, of the cut one)."""
    from ..models.meta import macs_per_token, multiplied
    from ..models.numbers import stored_bytes
    from ..pruning.budgets import bytes_per_token

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
    pair_macs = macs_per_token(model, graph, context=1) - whole
    return Work(whole - head_macs, head_macs, pair_macs, weights, dict(routed), cached)


@dataclass(frozen=True, slots=True)
class Measurement:
    """Median of all rounds, and the first and the third quartile."""

    median: float
    lower_quartile: float
    upper_quartile: float


def measurement(values: Sequence[float]) -> Measurement:
    quartiles = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Measurement(median(values), quartiles[0], quartiles[2])


@dataclass(frozen=True, slots=True)
class Rate:
    """``speedup``: over the first model in the same round. ``ideal``: what sizes allow; None if unknown."""

    tokens_per_second: Measurement
    speedup: Measurement
    ideal: float | None
    share_of_ideal: float | None


@dataclass(frozen=True, slots=True)
class ModelSpeed:
    """One model in one case. ``name``: as it was named."""

    name: str
    prefill: Rate
    decode: Rate


@dataclass(frozen=True, slots=True)
class BenchCase:
    """All models, in their order, at one batch size and one length of prompt."""

    batch: int
    prompt_tokens: int
    models: tuple[ModelSpeed, ...]


@dataclass(frozen=True)
class BenchResult:
    """The speed of several models in one ``runtime`` with ``settings``. ``dtypes``: of each model."""

    runtime: str
    settings: dict[str, Any]
    new_tokens: int
    rounds: int
    device: str
    threads: int
    dtypes: tuple[str, ...]
    cases: tuple[BenchCase, ...]

    def named(self, names: Sequence[str]) -> BenchResult:
        """The same with other names of the models."""

        def renamed(case: BenchCase) -> BenchCase:
            models = zip(case.models, names, strict=True)
            return replace(case, models=tuple(replace(model, name=name) for model, name in models))

        return replace(self, cases=tuple(map(renamed, self.cases)))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    subjects: Sequence[BenchSubject], runtime: Runtime, settings: BenchSettings, progress: Progress = QUIET
) -> BenchResult:
    """Measure prefill and decoding of all models, in every case of batch size × length of prompt. In each round, every
    model processes the same random tokens once, in an order that turns; the first round is not counted."""
    import torch

    for subject in subjects:
        runtime.check(subject)
    with ExitStack() as stack:
        sessions, works = [], []
        for subject in subjects:
            progress.status(f"loading {subject.ref}")
            session, work = runtime.open(subject)
            stack.callback(session.close)
            sessions.append(session)
            works.append(work)
        times = _measure(sessions, settings, progress)
        dtypes = tuple(session.dtype for session in sessions)
    new, cases = settings.new, []
    for (batch, prompt), (prefills, decodes) in times.items():
        prefill = _rates(prefills, batch * prompt, [work.prefill(prompt) for work in works])
        # The cache grows by a token with every step.
        decode = _rates(decodes, batch * new, [work.decode(batch, prompt + new / 2) for work in works])
        refs = [subject.ref for subject in subjects]
        cases.append(BenchCase(batch, prompt, tuple(map(ModelSpeed, refs, prefill, decode))))
    return BenchResult(
        runtime.name, runtime.record(), new, settings.rounds, subjects[0].device, torch.get_num_threads(), dtypes,
        tuple(cases),
    )  # fmt: skip


def _measure(
    sessions: Sequence[Session], settings: BenchSettings, progress: Progress
) -> dict[tuple[int, int], tuple[list[list[float]], list[list[float]]]]:
    """Batch size and length of prompt → seconds of prefill and of decoding, of each model in each counted round."""
    import torch

    cases = list(product(settings.batch, settings.prompt))
    times = {case: ([list[float]() for _ in sessions], [list[float]() for _ in sessions]) for case in cases}
    vocabulary = min(session.vocabulary for session in sessions)
    runs = list(product(cases, range(settings.rounds + 1), range(len(sessions))))
    for case, number, turn in progress.track(runs, "measuring"):
        # Tokens change from round to round, as a runtime may keep what it computed for a prompt.
        tokens = torch.randint(vocabulary, case, generator=torch.Generator().manual_seed(number))
        place = (turn + number) % len(sessions)
        session = sessions[place]
        session.start()
        began = perf_counter()
        session.prefill(tokens)
        prefilled = perf_counter()
        session.decode(settings.new)
        decoded = perf_counter()
        if number:
            times[case][0][place].append(prefilled - began)
            times[case][1][place].append(decoded - prefilled)
    return times


def _rates(times: Sequence[Sequence[float]], tokens: int, costs: Sequence[float | None]) -> tuple[Rate, ...]:
    """Speeds from seconds per model and round, and from what the steps of each model cost."""
    rates = []
    for rounds, cost in zip(times, costs, strict=True):
        speedup = measurement([first / seconds for first, seconds in zip(times[0], rounds, strict=True)])
        ideal = None if costs[0] is None or cost is None else costs[0] / cost
        share = None if ideal is None else speedup.median / ideal
        rates.append(Rate(measurement([tokens / seconds for seconds in rounds]), speedup, ideal, share))
    return tuple(rates)
