"""Timing decoder layers while the model decodes, with all units and with fewer of one kind of group at a time.

Layers are timed in passes through the whole model, as a layer that runs alone stays in the processor's caches and is
faster. The cut and the whole model run alternately, so that other load on the machine affects both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ...discovery.rules import with_rules
from ...errors import SelectionError, UnsupportedModelError
from ...models.generation import CachedModel, sample_tokens
from ...models.modeling_llmpruner import per_layer_lists
from ...models.numbers import clock_of
from ...models.positions import positions_of
from ...models.surgery import cut_copy
from ...structure.coupling import LAYER, CoupledGroup, CouplingGraph
from ...structure.queues import Queue, build_queue
from .base import BudgetSubject
from .latency_cost import LatencyTable, Timing, local_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LEVELS = (0.75, 0.5, 0.25, 0.0)
"""Shares of a group's units that are kept in trials; 0 means as few as may be kept."""
RUNS, WARM_UP, SAMPLE = 9, 2, 4
"""Numbers of timed passes, of passes before them that are not timed, and of layers of one shape cut in one trial."""

Stopwatch: TypeAlias = "Callable[[CachedModel, torch.Tensor, str], list[float]]"
"""(cached model, next token, path of the list of layers) → ms of every layer, then of everything else."""


def measure_latency(subject: BudgetSubject, context: int, stopwatch: Stopwatch | None = None) -> LatencyTable:
    """Times per token while ``context`` tokens are in the cache, whole and at `LEVELS` of every kind of group.

    Layers of equal shape share a measurement. Raises `SelectionError` for a context that the model cannot read, and
    `UnsupportedModelError` when its layers cannot be timed one by one.
    """
    model, graph, groups = subject.model, subject.graph, subject.groups
    check_context(model.config, context)
    family = with_rules(subject.family, model, {g.kind for g in groups})
    comparison = _Comparison(model, graph, context, stopwatch or decode_one)
    alike = _alike(model, graph, groups)
    queues = [q for g in groups if g.kind != LAYER and (q := build_queue(g, [0.0] * g.units)).steps]
    dense = comparison.run(model)[0]
    # Positions in a list of times: the layers of each shape, then everything else.
    places = [*alike, [graph.num_layers]]
    shares: list[dict[str, dict[int, float]]] = [{} for _ in places]
    for trial in subject.progress.track(_trials(queues, alike), "latency"):
        kept = {queue.group.name: queue.kept_after(steps) for queue, steps in trial}
        whole, part = comparison.run(cut_copy(model, graph, kept, family))
        dense += whole
        for place, found in zip(places, shares, strict=True):
            for group in (queue.group for queue, _ in trial if queue.group.layer in (None, *place)):
                at = place if group.layer is None else [q.group.layer for q, _ in trial if q.group.layer in place]
                share = _fastest(part, at) / _fastest(whole, at)
                found.setdefault(local_name(group), {})[len(kept[group.name])] = share
    return LatencyTable(
        device=_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        context=context,
        timings=tuple(
            _timing(place if place in alike else [], _fastest(dense, place), found)
            for place, found in zip(places, shares, strict=True)
        ),
    )


def check_context(config: PreTrainedConfig, context: int) -> None:
    """Raise `SelectionError` for more tokens in the cache than the model has positions for, besides those timed."""
    limit = positions_of(config)
    if limit is not None and context + RUNS + WARM_UP > limit:
        raise SelectionError(
            f"--context {context} and the tokens that are timed after it are beyond the model's {limit} positions; "
            f"give at most {limit - RUNS - WARM_UP}"
        )


def _timing(layers: Sequence[int], ms: float, shares: Mapping[str, Mapping[int, float]]) -> Timing:
    groups = {
        name: tuple((units, round(ms * share, 6)) for units, share in falling(levels).items())
        for name, levels in shares.items()
    }
    return Timing(layers=tuple(layers), ms=round(ms, 6), groups=groups)


def falling(levels: Mapping[int, float]) -> dict[int, float]:
    """The nearest shares to ``levels`` (units kept → share of the whole model's time) that do not increase with fewer
    units and are at most 1, most units first: isotonic regression by pooling adjacent violators (Barlow et al.,
    1972)."""
    pools: list[tuple[float, list[int]]] = []
    for units in sorted(levels, reverse=True):
        pools.append((min(levels[units], 1.0), [units]))
        while len(pools) > 1 and pools[-1][0] > pools[-2][0]:
            (fast, few), (slow, many) = pools.pop(), pools.pop()
            mean = (fast * len(few) + slow * len(many)) / (len(few) + len(many))
            pools.append((mean, many + few))
    return {units: share for share, members in pools for units in members}


class _Comparison:
    """Times the whole model and a cut one, alternately."""

    def __init__(self, model: PreTrainedModel, graph: CouplingGraph, context: int, stopwatch: Stopwatch) -> None:
        self._path, self._stopwatch = graph.layers, stopwatch
        self._prompt, self._token = sample_tokens(model, context), sample_tokens(model, 1)
        self._whole = CachedModel(model)
        self._whole.process(self._prompt)

    def run(self, other: PreTrainedModel) -> tuple[list[list[float]], list[list[float]]]:
        """Times of the whole model and of ``other``: for each pass, the list that a `Stopwatch` returns."""
        cut = CachedModel(other)
        cut.process(self._prompt)
        models = [self._whole.fork(), cut]
        times: tuple[list[list[float]], list[list[float]]] = ([], [])
        for run in range(-WARM_UP, RUNS):
            for cached, kept in zip(models, times, strict=True):
                measured = self._stopwatch(cached, self._token, self._path)
                if run >= 0:
                    kept.append(measured)
        return times


def decode_one(cached: CachedModel, token: torch.Tensor, path: str) -> list[float]:
    """Milliseconds for ``token`` of each layer in the list of layers at ``path``, then of everything else.

    Raises `UnsupportedModelError` for a model that does not run each layer exactly once.
    """
    layers: Any = cached.model.get_submodule(path)
    clock = clock_of(cached.model.device)
    marks: list[Any] = []

    def mark(*_: Any) -> None:
        marks.append(clock.now())

    handles = [h for x in layers for h in (x.register_forward_pre_hook(mark), x.register_forward_hook(mark))]
    try:
        begin = clock.now()
        cached.process(token)
        end = clock.now()
    finally:
        for handle in handles:
            handle.remove()
    if len(marks) != 2 * len(layers):
        raise UnsupportedModelError(
            f"a {cached.model.config.model_type} model does not run each of its layers once, so they cannot be timed "
            "one by one; choose another --budget"
        )
    each = [clock.between(a, b) for a, b in zip(marks[::2], marks[1::2], strict=True)]
    return [*each, max(clock.between(begin, end) - sum(each), 1e-6)]


def _alike(model: PreTrainedModel, graph: CouplingGraph, groups: Sequence[CoupledGroup]) -> list[list[int]]:
    """Lists of layer numbers with equal shapes, groups and per-layer entries of the configuration."""
    entries = per_layer_lists(model.config.get_text_config(), graph.num_layers).values()
    own: list[list[Any]] = [[str(values[n]) for values in entries] for n in range(graph.num_layers)]
    for name, shape in graph.shapes.items():
        number = graph.layer_of(name)
        if number is not None:
            own[number].append((name.removeprefix(f"{graph.layers}.{number}."), shape))
    for group in groups:
        if group.layer is not None:
            own[group.layer].append((local_name(group), group.units, group.minimum))
    classes: dict[str, list[int]] = {}
    for layer, facts in enumerate(own):
        classes.setdefault(repr(facts), []).append(layer)
    return list(classes.values())


def _trials(queues: Sequence[Queue], alike: Sequence[Sequence[int]]) -> list[list[tuple[Queue, int]]]:
    """Trials, each a list of (queue, number of steps to cut)."""
    found: dict[tuple[tuple[str, int], ...], list[tuple[Queue, int]]] = {}
    for together in _together(queues, alike):
        for level in LEVELS:
            steps = [(queue, queue.steps_for(queue.group.units * (1 - level))) for queue in together]
            trial = [(queue, number) for queue, number in steps if number]
            found.setdefault(tuple((queue.group.name, number) for queue, number in trial), trial)
    return [trial for trial in found.values() if trial]


def _together(queues: Sequence[Queue], alike: Sequence[Sequence[int]]) -> list[list[Queue]]:
    """For every local name of a group, the queues of the middle `SAMPLE` layers of each shape."""
    found: dict[str, list[Queue]] = {}
    for members in alike:
        names: dict[str, list[Queue]] = {}
        for queue in queues:
            if queue.group.layer in members:
                names.setdefault(local_name(queue.group), []).append(queue)
        for name, same in names.items():
            first = max(len(same) - SAMPLE, 0) // 2
            found.setdefault(name, []).extend(same[first : first + SAMPLE])
    return [*found.values(), *([q] for q in queues if q.group.layer is None)]


def _fastest(passes: Sequence[Sequence[float]], at: Sequence[int]) -> float:
    """The mean over positions ``at`` of the smallest time over all passes, as other load only adds to a time."""
    return statistics.fmean(min(times[n] for times in passes) for n in at)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
