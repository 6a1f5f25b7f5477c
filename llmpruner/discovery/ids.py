"""Identities of axis indices, and the ties between them.

Every index of every parameter axis gets an identity (a number from 0). Propagation ties identities that can only be
removed together, and marks those that cannot be removed; the connected components are the units.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

FIXED = -1
"""Cannot be removed: a position in the batch or in time, or inside a head."""
TABLE = -2
"""An index of a computed constant (ALiBi slopes, sinusoids): it is cut along with the axis that it is tied to."""
FREE = -3
"""A copy of one value; any number of copies will do."""


class Mark(str, Enum):
    """What a pass through the graph found about an identity."""

    BLOCKED = "blocked"
    CONSUMED = "consumed"
    """A weight is multiplied with an activation along it: setting that part of the weight to zero silences the unit."""
    RMS = "rms"
    """It is an element of the weight of an RMS norm."""
    ATTENDS = "attends"
    """It selects one softmax over positions, or one product of two activations: a head of attention, of linear
    attention or of a gated delta net."""
    ROUTED = "routed"
    """A top-k choice is made among these identities: experts."""
    SOFTMAX = "softmax"
    """A softmax is taken over these identities; they can be removed only if a top-k choice is made among them."""
    VOCABULARY = "vocabulary"
    """It is a token: of the rows that token ids look up, and of the logits."""


@dataclass
class Identities:
    """The growing set of identities with their ties and marks."""

    count: int = 0
    _edges: list[tuple[Ids, Ids]] = field(default_factory=list)
    _marks: dict[Mark, list[tuple[Ids, str]]] = field(default_factory=dict)
    _blocks: list[tuple[Ids, int]] = field(default_factory=list)
    _minimum: list[tuple[Ids, int]] = field(default_factory=list)
    _blocked: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(1024, dtype=bool))

    def new(self, size: int) -> Ids:
        ids = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        if self.count > len(self._blocked):
            self._blocked = np.r_[self._blocked, np.zeros(self.count, dtype=bool)]
        return ids

    def tie(self, left: Ids, right: Ids, reason: str) -> Ids:
        """Index *i* of both axes can only be removed together; where one of them cannot, the other is blocked with
        ``reason``. Returns the identities of the common axis."""
        if left is right:
            return left
        both = (left >= 0) & (right >= 0)
        if both.any():
            self._edges.append((left[both], right[both]))
        for mine, other in ((left, right), (right, left)):
            self.mark(mine[other == FIXED], Mark.BLOCKED, reason)
        known = np.where(left >= 0, left, right)
        stuck = (left == FIXED) | (right == FIXED)
        return np.where(stuck, FIXED, np.where(known >= 0, known, np.maximum(left, right)))

    def mark(self, ids: Ids, mark: Mark, reason: str = "") -> None:
        ids = ids[ids >= 0]
        if ids.size:
            self._marks.setdefault(mark, []).append((ids, reason))
            if mark is Mark.BLOCKED:
                self._blocked[ids] = True

    def removable(self, ids: Ids) -> bool:
        """Whether some of ``ids`` are not blocked yet; ties are not considered."""
        own = ids[ids >= 0]
        return bool(own.size) and not self._blocked[own].all()

    def block(self, ids: Ids, reason: str) -> None:
        self.mark(ids, Mark.BLOCKED, reason)

    def need_equal_blocks(self, ids: Ids, blocks: int) -> None:
        """``ids`` form this many equal blocks, each of which must keep the same number of units."""
        self._blocks.append((ids, blocks))

    def need_at_least(self, ids: Ids, minimum: int) -> None:
        """At least this many of ``ids`` must stay."""
        self._minimum.append((ids[ids >= 0], minimum))

    def components(self) -> Components:
        label = connected_components(self.count, self._edges)
        marked = {mark: np.zeros(self.count, dtype=bool) for mark in Mark}
        element = {mark: np.zeros(self.count, dtype=bool) for mark in Mark}
        reasons: dict[int, str] = {}
        for mark, entries in self._marks.items():
            for ids, reason in entries:
                roots = label[ids]
                marked[mark][roots] = True
                element[mark][ids] = True
                if mark is Mark.BLOCKED:
                    for root in np.unique(roots).tolist():
                        reasons.setdefault(root, reason)
        blocks = {int(root): n for ids, n in self._blocks for root in np.unique(label[ids])}
        minimum: dict[int, int] = {}
        for ids, least in self._minimum:
            for root in np.unique(label[ids]).tolist():
                minimum[root] = max(least, minimum.get(root, 1))
        return Components(label, marked, element, reasons, blocks, minimum)


@dataclass(frozen=True)
class Components:
    """``label``: identity → root of its component. ``marked[mark][root]``: whether any member has the mark;
    ``element[mark][id]``: whether this identity has. ``reasons``: root → why it is blocked. ``blocks``: root → number
    of equal blocks. ``minimum``: root → how many such units must stay."""

    label: Ids
    marked: dict[Mark, npt.NDArray[np.bool_]]
    element: dict[Mark, npt.NDArray[np.bool_]]
    reasons: dict[int, str]
    blocks: dict[int, int]
    minimum: dict[int, int]


def connected_components(count: int, edges: list[tuple[Ids, Ids]]) -> Ids:
    """Smallest member of the component of every node, by hooking and pointer jumping."""
    label = np.arange(count, dtype=np.int64)
    if not edges:
        return label
    a = np.concatenate([e[0] for e in edges])
    b = np.concatenate([e[1] for e in edges])
    while True:
        la, lb = label[a], label[b]
        differ = la != lb
        if not differ.any():
            return label
        np.minimum.at(label, np.maximum(la, lb)[differ], np.minimum(la, lb)[differ])
        while (label != (jumped := label[label])).any():
            label = jumped
