"""What a cut may remove: which units (`Scope`), how many of a group (`Widths`), and in which order (`Queue`)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from math import lcm

from ..errors import SelectionError, UnknownNameError, UnsupportedModelError
from .coupling import ATTENTION, EXPERT, HIDDEN, LAYER, MLP, QUERY, VOCABULARY, CoupledGroup, CouplingGraph
from .kept import Kept, renamed

ALIGNMENT = 64
"""Default multiple of kept widths, at which kernels of matrix products run at full speed."""
NARROW = 1024
"""Models with fewer hidden channels than this get multiples of 32 or less by default."""
FEWEST_WIDTHS = 8
"""A default multiple leaves every group at least this many widths to choose from."""
QUANTISED = 32
"""In GGUF and in torchao's int4, 32 or more weights of a row share a scale; widths must be multiples of it."""
SUPER_BLOCK = 256
"""Weights of a row that share scales in GGUF's k-quants (q4_k, q6_k …), which other rows can't have."""
COUNTED = frozenset({ATTENTION, QUERY, LAYER, EXPERT})
"""Kinds whose units are not widths of matrix products."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What may be cut: ``kinds`` of groups in ``layers``. ``removable``: layers that may be removed whole; None: all
    ``layers``. ``tokens``: those that may be removed; None: all."""

    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    removable: tuple[int, ...] | None = None
    tokens: frozenset[int] | None = None

    def groups(self, graph: CouplingGraph) -> tuple[CoupledGroup, ...]:
        """The groups in scope. Raises `UnsupportedModelError` or `UnknownNameError` for a kind that the model lacks."""
        for kind in self.kinds:
            if kind not in graph.kinds:
                if why := _why_not(graph, kind):
                    lacks = f"{kind} units that can be removed exactly (it has: {', '.join(graph.kinds) or 'none'})"
                    raise UnsupportedModelError(f"this model has no {lacks}; discovery could not follow {why}")
                raise UnknownNameError("kind of group in this model:", kind, graph.kinds)
        layers = {None, *self.layers}
        groups = tuple(group for group in graph.of_kinds(self.kinds) if group.layer in layers)
        if not groups:
            raise SelectionError("no coupled group is left to prune: select more with --kinds or --set prune.layers")
        return groups

    def allowed_units(self, group: CoupledGroup) -> frozenset[int] | None:
        """The units of ``group`` that may be removed; None: all."""
        if group.kind == VOCABULARY:
            return self.tokens
        if group.kind != LAYER:
            return None
        return frozenset(self.layers if self.removable is None else self.removable)


def _why_not(graph: CouplingGraph, kind: str) -> str:
    """Why discovery found no units of ``kind``: the most frequent reason and the first such axis; empty if unknown."""
    if kind == LAYER:
        return next((f"{b.parameter}: {b.reason}" for b in graph.blocked if b.parameter == graph.layers), "")
    if kind == VOCABULARY:
        return next((f"{b.parameter} axis {b.axis}: {b.reason}" for b in graph.blocked if "token ids" in b.reason), "")
    blocked = [b for b in graph.blocked if graph.is_decoder(b.parameter) != (kind == HIDDEN) and " in " in b.reason]
    if not blocked or kind not in (MLP, ATTENTION, HIDDEN, EXPERT):
        return ""
    count = Counter(b.reason for b in blocked)
    most = max(blocked, key=lambda b: count[b.reason])
    return f"{most.parameter} axis {most.axis}: {most.reason}"


@dataclass(frozen=True)
class Widths:
    """How many units groups may keep. ``uniform``: equal groups of all layers keep the same number: a configuration
    states one. ``round_to``: kept widths are multiples of it; ``adapts``: of `SUPER_BLOCK` where the dense width is
    one and ten or more fit into it, else halved where it leaves fewer widths than `FEWEST_WIDTHS`. ``dense``: group
    name → units before earlier cuts, by which multiples are chosen."""

    uniform: bool = False
    round_to: int = 1
    adapts: bool = False
    dense: Mapping[str, int] = field(default_factory=dict)

    def multiple(self, group: CoupledGroup) -> int:
        """The multiple that ``group`` must keep, which includes the group's own."""
        units = self.dense.get(group.name, group.units)
        if group.kind == EXPERT and self.uniform:
            # At most a quarter of them, so that they can be spread evenly over as many devices (expert parallelism).
            return lcm(max(n for n in (1, 2, 4, 8) if n == 1 or 4 * n <= units), group.multiple)
        if group.kind in COUNTED:
            return group.multiple
        # There is one vocabulary, so free shapes align it too.
        of_tokens = group.kind == VOCABULARY
        if self.adapts and not of_tokens and units % SUPER_BLOCK == 0 and units >= 10 * SUPER_BLOCK:
            return lcm(SUPER_BLOCK, group.multiple)
        multiple = max(self.round_to, ALIGNMENT) if of_tokens else self.round_to
        while (self.adapts or of_tokens) and multiple > 1 and units < FEWEST_WIDTHS * multiple:
            multiple //= 2
        return lcm(multiple, group.multiple)

    def alike(self, groups: Iterable[CoupledGroup]) -> list[list[str]]:
        """The names of the groups; those that must keep the same number of units are one list."""
        alike: dict[tuple[object, ...], list[str]] = {}
        for group in groups:
            # Groups of one size may have had different ones, and so have different multiples.
            in_layers = self.uniform and group.layer is not None
            key = (*like(group), self.multiple(group)) if in_layers else (group.name,)
            alike.setdefault(key, []).append(group.name)
        return list(alike.values())

    def after(self, graph: CouplingGraph, kept: Kept) -> Widths:
        """The same for what is left of ``graph`` after a cut to ``kept``."""
        names = renamed(graph, kept).items()
        return replace(self, dense={new: self.dense.get(old, graph.by_name[old].units) for old, new in names})


def like(group: CoupledGroup) -> tuple[object, ...]:
    """What a group in a layer shares with the equal groups of other layers."""
    return group.in_layer(0), group.kind, group.units, group.blocks, group.multiple, group.minimum


ANY = Widths()  # any number of units in any group


def widths_for(shape: str, round_to: int | None, hidden_size: int, dense: Mapping[str, int] | None = None) -> Widths:
    """The `Widths` of ``--shape`` and ``--round-to`` (None: the default) for a model of ``hidden_size`` channels."""
    if shape == "free":
        return Widths(round_to=round_to or 1)
    # Fewer channels than these are too few for any kernel to matter.
    default = ALIGNMENT if hidden_size >= NARROW else min(32, 2 ** max(0, (hidden_size // 16).bit_length() - 1))
    return Widths(uniform=True, round_to=round_to or default, adapts=round_to is None, dense=dense or {})


@dataclass(frozen=True)
class Queue:
    """The removal steps of one group, least important first. ``steps``: the units of each, the fewest after which the
    group's constraints hold again. ``scores``: mean importance of each step's units."""

    group: CoupledGroup
    steps: tuple[tuple[int, ...], ...]
    scores: tuple[float, ...]

    @cached_property
    def _totals(self) -> list[int]:
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
    """The steps of ``group`` by ascending ``scores``, ties by number. ``allowed``: units that may go (None: all)."""
    multiple = lcm(multiple, group.multiple)
    per_block = group.units // group.blocks
    blocks = [range(block * per_block, (block + 1) * per_block) for block in range(group.blocks)]
    free = [[u for u in units if allowed is None or u in allowed] for units in blocks]
    columns = [sorted(units, key=scores.__getitem__) for units in free]
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
    return Queue(group, tuple(steps), tuple(sum(scores[u] for u in step) / len(step) for step in steps))
