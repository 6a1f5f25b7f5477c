"""Measured latencies, as recorded in plans, and the time per token of a cut model computed from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise
from math import prod
from typing import ClassVar

from pydantic import Field

from ...errors import PlanError
from ...structure.coupling import LAYER, CoupledGroup, CouplingGraph
from ...structure.plan import Frozen, Units
from .costs import Cost
from .sizes import enclosing


class Timing(Frozen):
    """Time per token of one decoder layer, for layers of equal shape; or of everything outside the layers.

    ``layers``: numbers of the layers; empty for the time outside. ``ms``: milliseconds while nothing is cut.
    ``groups``: name of a group, without its layer → (units kept, ms), from most units to fewest.
    """

    layers: Units
    ms: float
    groups: dict[str, tuple[tuple[int, float], ...]] = Field(default_factory=dict)


class LatencyTable(Frozen):
    """Times to decode one token at a time while ``context`` tokens are in the cache, and where they were measured."""

    device: str
    dtype: str
    context: int
    timings: tuple[Timing, ...]


class LatencyCost(Cost):
    """Time per token in whole picoseconds, computed from measured layers.

    With T(l) the time of layer l, T₀ that of everything outside the layers, and S(l, g) the saving by group g of layer
    l:

        Σ over layers l:  R(l) · max(T(l) − Σ over g: S(l, g) · Q(g), 0)   +   R₀ · T₀

    S is interpolated linearly between the measured numbers of units. Q(g) is the kept share of the units that contain
    the units of g (the KV heads of query heads, which save nothing more after their KV head is removed), 1 for most
    groups. R is the product of the measured ratios of groups that cut every layer (hidden channels).
    """

    label, unit = "Latency per token", "ms per token"
    _PER_MS: ClassVar[int] = 10**9

    def __init__(self, graph: CouplingGraph, groups: Collection[CoupledGroup], table: LatencyTable) -> None:
        known = {layer for timing in table.timings for layer in timing.layers}
        if known != set(range(graph.num_layers)) or all(timing.layers for timing in table.timings):
            raise PlanError("the latencies of this target were measured on another model; measure again")
        self._timings = table.timings
        self._within: dict[int | None, list[CoupledGroup]] = {}
        for group in groups:
            if group.kind != LAYER:
                self._within.setdefault(group.layer, []).append(group)
        self._enclosing = enclosing(groups)

    def remaining(self, kept: Mapping[str, int] | None = None, gone: Collection[int] = ()) -> int:
        kept = kept or {}
        total = 0.0
        for timing in self._timings:
            stream = prod(self._measured(g, timing, kept) / timing.ms for g in self._within.get(None, ()))
            for layer in timing.layers:
                if layer not in gone:
                    total += stream * max(timing.ms - self._saved(timing, layer, kept), 0.0)
            if not timing.layers:
                total += stream * timing.ms
        return round(total * self._PER_MS)

    def _saved(self, timing: Timing, layer: int, kept: Mapping[str, int]) -> float:
        return sum(
            (timing.ms - self._measured(group, timing, kept))
            * prod(kept.get(g.name, g.units) / g.units for g in self._enclosing.get(group.name, ()))
            for group in self._within.get(layer, ())
        )

    def _measured(self, group: CoupledGroup, timing: Timing, kept: Mapping[str, int]) -> float:
        """Milliseconds of one layer when nothing but ``group`` is cut, to the units that it keeps."""
        units = kept.get(group.name, group.units)
        points = [(group.units, timing.ms), *timing.groups.get(local_name(group), ())]
        for (many, slow), (few, fast) in pairwise(points):
            if units >= few:
                return fast + (slow - fast) * (units - few) / (many - few)
        return points[-1][1]

    def value(self, amount: int) -> float:
        return amount / self._PER_MS

    def number(self, amount: int) -> str:
        return f"{self.value(amount):,.3f}"


def local_name(group: CoupledGroup) -> str:
    """The name of a group without the number of its layer: ``mlp`` of ``layers.3.mlp``."""
    return group.name if group.layer is None else group.name.removeprefix(f"layers.{group.layer}.")
