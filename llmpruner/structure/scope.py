"""Which units may be removed, and in which order: the scope of a cut, and queues of removal steps. Imports no torch."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import lcm

from ..errors import SelectionError, UnknownNameError, UnsupportedModelError
from .coupling import ATTENTION, EXPERT, HIDDEN, LAYER, MLP, VOCABULARY, CoupledGroup, CouplingGraph


@dataclass(frozen=True, slots=True)
class Scope:
    """The kinds of groups and the numbers of the decoder layers that may be cut. ``removable``: of the layers that may
    be removed whole; None for all ``layers``. ``tokens``: the tokens that may be removed; None for all."""

    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    removable: tuple[int, ...] | None = None
    tokens: frozenset[int] | None = None

    def groups(self, graph: CouplingGraph) -> tuple[CoupledGroup, ...]:
        """The groups in scope. Raises `UnsupportedModelError` for a kind that discovery did not find, with the reason,
        and `UnknownNameError` for any other that the model does not have."""
        for kind in self.kinds:
            if kind not in graph.kinds:
                why = _why_not(graph, kind)
                if why:
                    raise UnsupportedModelError(
                        f"this model has no {kind} units that can be removed exactly "
                        f"(it has: {', '.join(graph.kinds) or 'none'}); discovery could not follow {why}"
                    )
                raise UnknownNameError("kind of group in this model:", kind, graph.kinds)
        inside = set(self.layers)
        found = tuple(g for g in graph.of_kinds(self.kinds) if g.layer is None or g.layer in inside)
        if not found:
            raise SelectionError("no coupled group is left to prune: select more with --kinds or --set prune.layers")
        return found

    def allowed_units(self, group: CoupledGroup) -> frozenset[int] | None:
        """The units of ``group`` that may be removed: of the decoder layers and of the tokens, the removable ones; else
        None: all."""
        if group.kind == VOCABULARY:
            return self.tokens
        if group.kind != LAYER:
            return None
        return frozenset(self.layers if self.removable is None else self.removable)


def _why_not(graph: CouplingGraph, kind: str) -> str:
    """The most frequent reason of blocked axes outside the decoder layers (for hidden channels) or inside them (for
    the other usual kinds), with the first such axis; for layers, the reason of their list. Empty when there is none."""
    if kind == LAYER:
        return next((f"{b.parameter}: {b.reason}" for b in graph.blocked if b.parameter == graph.layers), "")
    if kind == VOCABULARY:
        return next((f"{b.parameter} axis {b.axis}: {b.reason}" for b in graph.blocked if "token ids" in b.reason), "")
    if kind not in (MLP, ATTENTION, HIDDEN, EXPERT):
        return ""
    blocked = [b for b in graph.blocked if graph.is_decoder(b.parameter) != (kind == HIDDEN) and " in " in b.reason]
    if not blocked:
        return ""
    reason, _ = Counter(b.reason for b in blocked).most_common(1)[0]
    first = next(b for b in blocked if b.reason == reason)
    return f"{first.parameter} axis {first.axis}: {reason}"


@dataclass(frozen=True)
class Queue:
    """The removal steps of one group, least important first. ``steps``: the units of each step, which is the smallest
    removal after which the group's constraints hold. ``scores``: mean importance of each step's units."""

    group: CoupledGroup
    steps: tuple[tuple[int, ...], ...]
    scores: tuple[float, ...]

    @cached_property
    def _totals(self) -> list[int]:
        """Units removed after 0, 1, 2 … steps."""
        return list(accumulate((len(step) for step in self.steps), initial=0))

    def removed_after(self, steps: int) -> int:
        """Number of units that the first ``steps`` steps remove."""
        return self._totals[steps]

    def kept_after(self, steps: int) -> tuple[int, ...]:
        """The units that are left after the first ``steps`` steps, in ascending order."""
        gone = {unit for step in self.steps[:steps] for unit in step}
        return tuple(unit for unit in range(self.group.units) if unit not in gone)

    def steps_for(self, units: float) -> int:
        """How many steps remove the number of units nearest to ``units`` (the smaller number on a tie)."""
        above = min(bisect_left(self._totals, units), len(self.steps))
        below = max(above - 1, 0)
        return above if self._totals[above] - units < units - self._totals[below] else below


def build_queue(
    group: CoupledGroup, scores: Sequence[float], *, allowed: Collection[int] | None = None, multiple: int = 1
) -> Queue:
    """The units of ``group`` in ascending order of ``scores`` (ties by unit number), divided into steps. ``allowed``:
    the units that may be removed (None: all). ``multiple``: besides the group's own, see `Widths.multiple`."""
    multiple = lcm(multiple, group.multiple)
    per_block = group.units // group.blocks
    columns: list[list[int]] = []
    for block in range(group.blocks):
        units = range(block * per_block, (block + 1) * per_block)
        free = [u for u in units if allowed is None or u in allowed]
        columns.append(sorted(free, key=scores.__getitem__))
    steps: list[tuple[int, ...]] = []
    pending: list[int] = []
    left = group.units
    for row in zip(*columns, strict=False):
        pending += row
        left -= len(row)
        if left < max(group.minimum, 1):
            break
        if left % multiple == 0:
            steps.append(tuple(sorted(pending)))
            pending = []
    means = tuple(sum(scores[u] for u in step) / len(step) for step in steps)
    return Queue(group, tuple(steps), means)
