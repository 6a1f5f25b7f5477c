"""Speed of several models in one runtime: all in memory, and their runs in turn, so that other load on the machine
affects all alike."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch

from ..progress import QUIET, Progress
from ..settings import BenchSettings
from .runtime import BenchSubject, Runtime, Session


@dataclass(frozen=True, slots=True)
class Measurement:
    """Median of all rounds, and the first and the third quartile."""

    median: float
    lower_quartile: float
    upper_quartile: float


def measurement(values: Sequence[float]) -> Measurement:
    """The `Measurement` of one value or more."""
    quartiles = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Measurement(median(values), quartiles[0], quartiles[2])


@dataclass(frozen=True, slots=True)
class Rate:
    """The speed of one model in one case. ``tokens_per_second``: of all sequences together. ``speedup``: over the first
    model, of runs of the same round. ``ideal``: the speed-up that sizes allow; ``share_of_ideal``: what is reached of
    it. Both are None where sizes are not known."""

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
    """The speed of several models in one runtime. ``runtime``: its name, with ``settings``. ``device``, ``threads``,
    ``dtypes``: what the times depend on, the last for each model."""

    runtime: str
    settings: dict[str, Any]
    new_tokens: int
    rounds: int
    device: str
    threads: int
    dtypes: tuple[str, ...]
    cases: tuple[BenchCase, ...]

    def as_json(self) -> dict[str, Any]:
        """JSON values by the names of the fields."""
        return asdict(self)


def bench(
    subjects: Sequence[BenchSubject], runtime: Runtime, settings: BenchSettings, progress: Progress = QUIET
) -> BenchResult:
    """Measure prefill and decoding of all models, in every case of batch size × length of prompt.

    In each of ``rounds`` rounds, after one that is not counted, every model processes the same random
    tokens once; the order of the models turns from round to round. Raises what `Runtime.check` raises, before any of
    them is loaded.
    """
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
    for (batch, prompt), seconds in times.items():
        prefills = [[prefill for prefill, _ in rounds] for rounds in seconds]
        decodes = [[decode for _, decode in rounds] for rounds in seconds]
        prefill = _rates(prefills, batch * prompt, [work.prefill(prompt) for work in works])
        # The cache grows by a token with every step.
        decode = _rates(decodes, batch * new, [work.decode(batch, prompt + new / 2) for work in works])
        names = (subject.ref for subject in subjects)
        cases.append(BenchCase(batch, prompt, tuple(map(ModelSpeed, names, prefill, decode))))
    return BenchResult(
        runtime.name, runtime.record(), new, settings.rounds, subjects[0].device, torch.get_num_threads(), dtypes,
        tuple(cases),
    )  # fmt: skip


def _measure(
    sessions: Sequence[Session], settings: BenchSettings, progress: Progress
) -> dict[tuple[int, int], list[list[tuple[float, float]]]]:
    """Batch size and length of prompt → for every model, the seconds of the prefill and of all decoding steps, in each
    counted round."""
    cases = list(product(settings.batch, settings.prompt))
    times: dict[tuple[int, int], list[list[tuple[float, float]]]] = {case: [[] for _ in sessions] for case in cases}
    vocabulary = min(session.vocabulary for session in sessions)
    steps = [
        (case, number, (place + number) % len(sessions))
        for case in cases
        for number in range(settings.rounds + 1)
        for place in range(len(sessions))
    ]
    for case, number, place in progress.track(steps, "measuring"):
        # Tokens change from round to round, as a runtime may keep what it computed for a prompt.
        tokens = torch.randint(vocabulary, case, generator=torch.Generator().manual_seed(number))
        session = sessions[place]
        session.start()
        began = perf_counter()
        session.prefill(tokens)
        prefilled = perf_counter()
        session.decode(settings.new)
        decoded = perf_counter()
        if number:
            times[case][place].append((prefilled - began, decoded - prefilled))
    return times


def _rates(times: Sequence[Sequence[float]], tokens: int, costs: Sequence[float | None]) -> tuple[Rate, ...]:
    """Speeds from seconds per model and round, and from what the steps of each model cost."""
    rates = []
    for own, cost in zip(times, costs, strict=True):
        speedup = measurement([first / seconds for first, seconds in zip(times[0], own, strict=True)])
        ideal = None if costs[0] is None or cost is None else costs[0] / cost
        share = None if ideal is None else speedup.median / ideal
        rates.append(Rate(measurement([tokens / seconds for seconds in own]), speedup, ideal, share))
    return tuple(rates)
