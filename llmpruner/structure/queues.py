"""The order in which the units of a group are removed, in steps after each of which its constraints hold."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import lcm

from .coupling import CoupledGroup


@dataclass(frozen=True)
class Queue:
    """The removal steps of one group, least important first. ``steps``: the units of each step, which is the smallest
    removal after which the group's constraints hold. ``scores``: mean importance of each step's units. ``members``:
    names of the groups that take every step together, where it stands for several; else empty."""

    group: CoupledGroup
    steps: tuple[tuple[int, ...], ...]
    scores: tuple[float, ...]
    members: tuple[str, ...] = ()

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
    """The units of ``group`` in ascending order of ``scores`` (ties by unit number), divided into steps.

    ``allowed``: the units that may be removed (None: all). ``multiple``: the kept number is a multiple of it
    (`Widths.multiple`) and of the group's own ``multiple``; the group's ``minimum`` and ``blocks`` hold too.
    """
    multiple = lcm(multiple, group.multiple)
    per_block = group.units // group.blocks
    columns: list[list[int]] = []
    for block in range(group.blocks):
        units = range(block * per_block, (block + 1) * per_block)
        free = [u for u in units if allowed is None or u in allowed]
        columns.append(sorted(free, key=lambda u: (scores[u], u)))
    rows = list(zip(*columns, strict=False))
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
    """Group name → kept units after ``taken`` steps of each queue, without groups that keep all units."""
    return {q.group.name: q.kept_after(taken[q.group.name]) for q in queues if taken.get(q.group.name)}
