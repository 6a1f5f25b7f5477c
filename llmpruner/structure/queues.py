"""What may go, in which order: every group's units as a queue of removal steps that keep its constraints."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import lcm

from .coupling import ATTENTION, LAYER, QUERY, CoupledGroup


@dataclass(frozen=True)
class Queue:
    """The removal steps of one group, least important first. A step is the smallest removal after which the group's
    constraints hold again; ``scores`` is the mean importance of each step's units."""

    group: CoupledGroup
    steps: tuple[tuple[int, ...], ...]
    scores: tuple[float, ...]

    @cached_property
    def _totals(self) -> list[int]:
        """Units removed after 0, 1, 2 … steps."""
        return list(accumulate((len(step) for step in self.steps), initial=0))

    def removed_after(self, steps: int) -> int:
        return self._totals[steps]

    def kept_after(self, steps: int) -> tuple[int, ...]:
        gone = {unit for step in self.steps[:steps] for unit in step}
        return tuple(unit for unit in range(self.group.units) if unit not in gone)

    def steps_for(self, units: float) -> int:
        """How many steps remove the number of units nearest to ``units`` (the smaller of two that are as near)."""
        above = min(bisect_left(self._totals, units), len(self.steps))
        below = max(above - 1, 0)
        return above if self._totals[above] - units < units - self._totals[below] else below


def build_queue(
    group: CoupledGroup, scores: Sequence[float], *, allowed: Collection[int] | None = None, round_to: int = 1
) -> Queue:
    """Order the units of ``group`` by ``scores`` (ties by unit number) into steps.

    ``allowed``: the units that may go (None: all). ``round_to``: the kept number must be a multiple of it, besides
    the group's own ``multiple``, ``minimum`` and ``blocks``.
    """
    per_block = group.units // group.blocks
    columns: list[list[int]] = []
    for block in range(group.blocks):
        units = range(block * per_block, (block + 1) * per_block)
        free = [u for u in units if allowed is None or u in allowed]
        columns.append(sorted(free, key=lambda u: (scores[u], u)))
    rows = list(zip(*columns, strict=False))
    # Rounding is for the widths that kernels see; heads and layers are counts.
    multiple = lcm(1 if group.kind in (ATTENTION, QUERY, LAYER) else round_to, group.multiple)
    steps: list[tuple[int, ...]] = []
    pending: list[int] = []
    left = group.units
    for row in rows:
        pending += row
        left -= len(row)
        if left < max(group.minimum, 1):
            break
        if left % multiple == 0:
            steps.append(tuple(sorted(pending)))
            pending = []
    means = tuple(sum(scores[u] for u in step) / len(step) for step in steps)
    return Queue(group, tuple(steps), means)


def kept_units(queues: Sequence[Queue], taken: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Group name → kept units after ``taken`` steps of each queue; groups that lose nothing are left out."""
    return {q.group.name: q.kept_after(taken[q.group.name]) for q in queues if taken.get(q.group.name)}
