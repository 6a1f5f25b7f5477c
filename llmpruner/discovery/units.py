"""From connected identities to sets of units with index maps.

Tied identities form a component. Components that own equally many indices of the same axes are the units of one set.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from ..structure.coupling import IndexMap, Role, index_map
from .ids import Components, Ids, Mark
from .propagate import Propagation

Slot = tuple[str, int]
"""A parameter and one of its axes."""


@dataclass(frozen=True)
class OwnedAxis:
    """The indices of one axis that units own. ``rows``: (units, k)."""

    parameter: str
    axis: int
    role: Role
    rows: Ids
    offset: float = 0.0

    def index_maps(self) -> list[IndexMap]:
        """One map for every run of columns in which the indices of all units are consecutive."""
        width = self.rows.shape[1]
        joined = (np.diff(self.rows, axis=1) == 1).all(axis=0) if width > 1 else np.zeros(0, dtype=bool)
        starts = [0, *(np.flatnonzero(~joined) + 1).tolist(), width]
        return [index_map(self.rows[:, first:stop].tolist()) for first, stop in itertools.pairwise(starts)]


@dataclass(frozen=True)
class UnitSet:
    """Units that each own the same number of indices of the same axes of parameters (``owned``) and ``buffers``."""

    owned: tuple[OwnedAxis, ...]
    buffers: tuple[OwnedAxis, ...]
    marks: frozenset[Mark]
    blocks: int
    minimum: int

    @property
    def units(self) -> int:
        return int(self.owned[0].rows.shape[0])


def unit_sets(run: Propagation) -> tuple[list[UnitSet], dict[Slot, str]]:
    """All sets of like units that can be removed; and (parameter, axis) → reason, for axes that belong to none."""
    parts = run.ids.components()
    slots = list(run.parameters)
    owner = np.concatenate([np.full(len(run.parameters[s]), n) for n, s in enumerate(slots)])
    ids = np.concatenate([run.parameters[s] for s in slots])
    index = np.concatenate([np.arange(len(run.parameters[s])) for s in slots])
    roots = parts.label[ids]
    marked = parts.marked
    closed = marked[Mark.BLOCKED] | (marked[Mark.SOFTMAX] & ~marked[Mark.ROUTED])
    open_ = ~closed[roots]
    reasons = {s: why for s, why in _reasons(parts, slots, owner, roots, open_).items() if s[0] not in run.buffers}
    order = np.lexsort((index[open_], owner[open_], roots[open_]))
    roots, owner, index = roots[open_][order], owner[open_][order], index[open_][order]
    offsets = {int(i): offset for ids, offset in run.offsets for i in ids[ids >= 0].tolist()}
    found = []
    for (_, pattern), members in _by_pattern(roots, owner, parts).items():
        matrix = np.stack([index[a:b] for a, b in members])
        matrix = matrix[np.argsort(matrix[:, 0], kind="stable")]
        owned, column = [], 0
        for slot, width in pattern:
            name, axis = slots[slot]
            first = run.parameters[slots[slot]][matrix[0, column]]
            role = _role(parts, int(first))
            rows = matrix[:, column : column + width]
            owned.append(OwnedAxis(name, axis, role, rows, offsets.get(int(first), 0.0)))
            column += width
        root = int(roots[members[0][0]])
        marks = frozenset(m for m in Mark if parts.marked[m][root])
        own = tuple(s for s in owned if s.parameter not in run.buffers)
        if own:
            buffers = tuple(s for s in owned if s.parameter in run.buffers)
            found.append(UnitSet(own, buffers, marks, parts.blocks.get(root, 1), parts.minimum.get(root, 1)))
    return found, reasons


def _reasons(
    parts: Components, slots: list[Slot], owner: Ids, roots: Ids, open_: npt.NDArray[np.bool_]
) -> dict[Slot, str]:
    reasons = {}
    for n, slot in enumerate(slots):
        mine = owner == n
        if mine.any() and not (open_ & mine).any():
            root = int(roots[mine][0])
            reasons[slot] = parts.reasons.get(root, "a softmax runs over it")
    return reasons


def _by_pattern(
    roots: Ids, owner: Ids, parts: Components
) -> dict[tuple[int, tuple[tuple[int, int], ...]], list[tuple[int, int]]]:
    """(number of blocks, (slot, count) pairs that are owned) → components, each as a range of the sorted arrays."""
    if not len(roots):
        return {}
    pair = np.flatnonzero(np.r_[True, (np.diff(roots) != 0) | (np.diff(owner) != 0)])
    runs = zip(roots[pair].tolist(), owner[pair].tolist(), np.diff(np.r_[pair, len(roots)]).tolist(), strict=True)
    found: dict[tuple[int, tuple[tuple[int, int], ...]], list[tuple[int, int]]] = {}
    stop = 0
    for root, of_root in itertools.groupby(runs, key=itemgetter(0)):
        pattern = tuple((slot, size) for _, slot, size in of_root)
        start, stop = stop, stop + sum(size for _, size in pattern)
        found.setdefault((parts.blocks.get(root, 1), pattern), []).append((start, stop))
    return found


def _role(parts: Components, identity: int) -> Role:
    if parts.element[Mark.RMS][identity]:
        return Role.NORM
    return Role.CONSUMES if parts.element[Mark.CONSUMED][identity] else Role.PRODUCES
