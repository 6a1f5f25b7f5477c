"""Costs: what a budget counts, as a whole number that depends on how many units each group keeps.

A cost is arithmetic on counts, so that allocation can try thousands of choices. Three come from shapes alone
(`WeightCost` for parameters and bytes, `MacsCost`), two from a measurement that was made before (`CacheCost`,
`LatencyCost`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from math import prod
from typing import ClassVar

from ..errors import PlanError, SelectionError
from ..structure.coupling import ATTENTION, LAYER, CoupledGroup, CouplingGraph, Role
from ..structure.kept import layer_numbers, renamed, restrict
from ..structure.plan import LatencyTable, Timing
from .sizes import SizeModel, counts, enclosing


class Cost(ABC):
    """What is left of a budget. ``label``: what it counts; ``unit``: of the numbers that `number` shows."""

    label: str
    unit: str

    @abstractmethod
    def remaining(self, kept: Mapping[str, int] | None = None, gone: Collection[int] = ()) -> int:
        """The cost of a model with ``kept`` units (group name → number; missing groups keep all), less the decoder
        layers ``gone``. Whole, so that no rounding error looks like a saving."""

    def value(self, amount: int) -> float:
        """``amount`` in units of ``unit``."""
        return amount

    def number(self, amount: int) -> str:
        """``amount`` for people to read, without its unit."""
        return f"{amount:,}"


class WeightCost(Cost):
    """Parameters, each counted ``weights[name]`` times: once, or as many bytes as its elements take."""

    def __init__(
        self, sizes: SizeModel, weights: Mapping[str, int], label: str = "parameters", unit: str = "parameters"
    ) -> None:
        self.label, self.unit = label, unit
        self._sizes, self._weights = sizes, weights

    def remaining(self, kept: Mapping[str, int] | None = None, gone: Collection[int] = ()) -> int:
        kept, sizes = kept or {}, self._sizes
        return sum(
            weight * sizes.elements(name, kept)
            for name, weight in self._weights.items()
            if sizes.layer_of.get(name, -1) not in gone
        )


def parameter_cost(graph: CouplingGraph, groups: Collection[CoupledGroup], *, decoder: bool) -> WeightCost:
    """Parameters of the decoder's layers, or of everything; tied ones count once."""
    names = {n: 1 for n in graph.shapes if n not in graph.ties and (graph.is_decoder(n) or not decoder)}
    return WeightCost(SizeModel(graph, groups), names, "decoder parameters" if decoder else "parameters")


class MacsCost(Cost):
    """Multiply-accumulate operations per token, exactly as `llmpruner.evaluation.cost.macs_per_token` counts them.

    ``multiplied``: parameter → how many experts of those stacked in it a token visits, None where it stacks none.
    """

    label, unit = "MACs per token", "MACs per token"

    def __init__(
        self,
        graph: CouplingGraph,
        groups: Collection[CoupledGroup],
        multiplied: Mapping[str, int | None],
        context: int,
    ) -> None:
        attention = graph.of_kinds([ATTENTION])
        self._sizes = SizeModel(graph, {g.name: g for g in (*groups, *attention)}.values())
        self._multiplied, self._context = multiplied, context
        self._reads = [
            (group, *key)
            for group in attention
            for key in dict.fromkeys((s.parameter, s.axis) for s in group.spans_with(Role.CONSUMES))
        ]

    def remaining(self, kept: Mapping[str, int] | None = None, gone: Collection[int] = ()) -> int:
        kept, sizes = kept or {}, self._sizes
        weights = 0
        for name, visited in self._multiplied.items():
            if sizes.layer_of.get(name, -1) in gone:
                continue
            count = sizes.elements(name, kept)
            weights += count if visited is None else count // sizes.size(name, 0, kept) * visited
        width = sum(sizes.owned(name, axis, g, kept) for g, name, axis in self._reads if g.layer not in gone)
        return weights + 2 * self._context * width


class CacheCost(Cost):
    """Bytes that the key/value cache grows by with every token.

    ``layers``: bytes of each decoder layer while nothing is cut. ``per_unit``: (group name, layer) → bytes of that
    layer that go with each unit of the group.
    """

    label, unit = "KV cache per token", "bytes of KV cache per token"

    def __init__(
        self,
        layers: Sequence[int],
        per_unit: Mapping[tuple[str, int], Fraction],
        units: Mapping[str, int],
    ) -> None:
        self._layers, self._per_unit, self._units = layers, per_unit, units

    def remaining(self, kept: Mapping[str, int] | None = None, gone: Collection[int] = ()) -> int:
        kept = kept or {}
        lost = sum(
            rate * (self._units[name] - kept[name])
            for (name, layer), rate in self._per_unit.items()
            if name in kept and layer not in gone
        )
        return round(sum(size for layer, size in enumerate(self._layers) if layer not in gone) - lost)


class LatencyCost(Cost):
    """Time per token, put together from measured layers; counted in whole picoseconds.

    Between the measured numbers of units it is interpolated. What groups of one layer save adds up, except that query
    heads inside KV heads save nothing where their KV head is gone; groups that cut all layers scale each.
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


class CutCost(Cost):
    """``cost`` of a model that lost all but ``cut`` already, in the groups and layers of what is left."""

    def __init__(self, cost: Cost, graph: CouplingGraph, cut: Mapping[str, Sequence[int]]) -> None:
        self.label, self.unit, self._cost = cost.label, cost.unit, cost
        self._kept, self._gone = counts(graph, cut)
        self._numbers = {new: old for old, new in layer_numbers(graph, cut).items()}
        left = restrict(graph, cut).by_name
        self._groups = {
            new: (old, self._kept.get(old, graph.by_name[old].units), left[new].units)
            for old, new in renamed(graph, cut).items()
            if not left[new].modules
        }

    def remaining(self, kept: Mapping[str, int] | None = None, gone: Collection[int] = ()) -> int:
        now = dict(self._kept)
        for name, units in (kept or {}).items():
            old, before, present = self._groups[name]
            now[old] = before * units // present
        return self._cost.remaining(now, self._gone | {self._numbers[layer] for layer in gone})

    def value(self, amount: int) -> float:
        return self._cost.value(amount)

    def number(self, amount: int) -> str:
        return self._cost.number(amount)


def savings(cost: Cost, group: CoupledGroup) -> list[float]:
    """What each unit of ``group`` saves: a layer what it costs itself, other units the mean over their group."""
    whole = cost.remaining()
    if group.modules:
        return [cost.value(whole - cost.remaining(gone=(unit,))) for unit in range(group.units)]
    least = max(group.minimum, group.blocks if group.blocks > 1 else 1)
    if least >= group.units:
        return [0.0] * group.units
    saved = cost.value(whole - cost.remaining({group.name: least})) / (group.units - least)
    return [saved] * group.units


def saving_units(
    cost: Cost, groups: Sequence[CoupledGroup], allowed: Mapping[str, frozenset[int] | None]
) -> dict[str, frozenset[int] | None]:
    """``allowed`` (group name → units that may go, None for all), less what saves nothing of ``cost``.

    Raises `SelectionError` when nothing is left.
    """
    found: dict[str, frozenset[int] | None] = {}
    for group in groups:
        units, saved = allowed[group.name], savings(cost, group)
        useful = {u for u, saves in enumerate(saved) if saves > 0 and (units is None or u in units)}
        if useful:
            found[group.name] = None if len(useful) == group.units else frozenset(useful)
    if not found:
        kinds = ", ".join(dict.fromkeys(group.kind for group in groups))
        raise SelectionError(f"{kinds} units save nothing of the {cost.label}; choose others with --kinds")
    return found
