"""One benchmark: all models in memory, and their runs in turn, so that other load on the machine affects all alike."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import product
from typing import Any

import psutil
import torch

from ...errors import ModelError
from ...progress import QUIET, Progress
from .base import BenchSubject, Runtime, Session
from .results import BenchCase, BenchResult, Rate, measurement
from .timing import Times, timed
from .work import Work


def bench(
    subjects: Sequence[BenchSubject],
    runtime: Runtime,
    *,
    batches: Sequence[int],
    prompts: Sequence[int],
    new_tokens: int,
    rounds: int,
    device: str = "cpu",
    progress: Progress = QUIET,
) -> BenchResult:
    """Measure prefill and decoding of all models, in every case of ``batches`` × ``prompts``.

    In each of ``rounds`` rounds, after one that is not counted, every model processes the same random
    tokens once; the order of the models turns from round to round. Raises `ModelError` when the models do not fit into
    memory together, and what `Runtime.check` raises, before any of them is loaded.
    """
    _check_memory(subjects, [runtime.check(subject) for subject in subjects], device)
    with ExitStack() as stack:
        sessions, works = [], []
        for subject in subjects:
            progress.status(f"loading {subject.ref}")
            session, work = runtime.open(subject)
            stack.callback(session.close)
            sessions.append(session)
            works.append(work)
        found = _measured(sessions, list(product(batches, prompts)), new_tokens, rounds, progress)
        cases = tuple(_case(works, *case, new_tokens, times) for case, times in found.items())
        facts: dict[str, Any] = {"device": device, "threads": torch.get_num_threads()}
        facts["dtypes"] = [session.dtype for session in sessions]
    names = tuple(subject.ref for subject in subjects)
    return BenchResult(names, runtime.name, runtime.record(), new_tokens, rounds, facts, cases)


def _check_memory(subjects: Sequence[BenchSubject], needed: Sequence[int], device: str) -> None:
    """Raise `ModelError` for models that do not fit into the free memory of ``device`` together."""
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        return
    free = psutil.virtual_memory().available if kind == "cpu" else torch.cuda.mem_get_info(torch.device(device))[0]
    if sum(needed) > free:
        each = ", ".join(f"'{s.ref}' {size / 2**30:.1f} GiB" for s, size in zip(subjects, needed, strict=True))
        raise ModelError(
            f"the weights do not fit into the {free / 2**30:.1f} GiB of memory that are free: {each}; all models are "
            "in memory at the same time, so name fewer, or give --dtype bfloat16"
        )


def _measured(
    sessions: Sequence[Session],
    cases: Sequence[tuple[int, int]],
    new_tokens: int,
    rounds: int,
    progress: Progress,
) -> dict[tuple[int, int], list[list[Times]]]:
    """Case → the times of every model, one per counted round."""
    found: dict[tuple[int, int], list[list[Times]]] = {case: [[] for _ in sessions] for case in cases}
    vocabulary = min(session.vocabulary for session in sessions)
    steps = [
        (case, number, (place + number) % len(sessions))
        for case in cases
        for number in range(rounds + 1)
        for place in range(len(sessions))
    ]
    for case, number, place in progress.track(steps, "measuring"):
        # Tokens change from round to round, as a runtime may keep what it computed for a prompt.
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(vocabulary, case, generator=generator)
        times = timed(sessions[place], tokens, new_tokens)
        if number:
            found[case][place].append(times)
    return found


def _case(
    works: Sequence[Work], batch: int, prompt: int, new_tokens: int, times: Sequence[Sequence[Times]]
) -> BenchCase:
    prefill = [work.prefill(prompt) for work in works]
    # The cache grows by a token with every step.
    decode = [work.decode(batch, prompt + new_tokens / 2) for work in works]
    return BenchCase(
        batch,
        prompt,
        _rates([[t.prefill for t in own] for own in times], batch * prompt, prefill),
        _rates([[t.decode for t in own] for own in times], batch * new_tokens, decode),
    )


def _rates(times: Sequence[Sequence[float]], tokens: int, costs: Sequence[float | None]) -> tuple[Rate, ...]:
    """Speeds from milliseconds per model and round, and from what the steps of each model cost."""
    return tuple(
        Rate(
            measurement([tokens * 1e3 / ms for ms in own]),
            measurement([first / ms for first, ms in zip(times[0], own, strict=True)]),
            None if costs[0] is None or cost is None else costs[0] / cost,
        )
        for own, cost in zip(times, costs, strict=True)
    )
