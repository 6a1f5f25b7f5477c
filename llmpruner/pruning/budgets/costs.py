"""Cost: the function from numbers of kept units to what a budget counts. Imports no torch.

A cost is arithmetic on counts, so that allocations can evaluate thousands of selections.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence

from ...errors import SelectionError
from ...structure.coupling import CoupledGroup, CouplingGraph
from ...structure.kept import layer_numbers, renamed, restrict
from .sizes import counts


class Cost(ABC):
    """The cost of a model as a function of the number of units that its groups keep. ``label``: name of the cost;
    ``unit``: of the numbers that `number` formats."""

    label: str
    unit: str

    @abstractmethod
    def remaining(self, kept: Mapping[str, int] | None = None, gone: Collection[int] = ()) -> int:
        """The cost of the model with ``kept`` units (group name → number; missing groups keep all) and without the
        decoder layers ``gone`` (their numbers). An integer, so that rounding errors cannot be taken for savings."""

    def value(self, amount: int) -> float:
        """``amount`` in units of ``unit``."""
        return amount

    def number(self, amount: int) -> str:
        """``amount`` formatted for people, without its unit."""
        return f"{amount:,}"


class CutCost(Cost):
    """The cost of a cut model, from ``cost`` of the model before the cut.

    ``graph``: before the cut; ``cut``: group name → kept units. The arguments of `remaining` are in groups and layer
    numbers of the cut model.
    """

    def __init__(self, cost: Cost, graph: CouplingGraph, cut: Mapping[str, Sequence[int]]) -> None:
        self.label, self.unit, self._cost = cost.label, cost.unit, cost
        self._kept, self._gone = counts(graph, cut)
        self._numbers = {new: old for old, new in layer_numbers(graph, cut).items()}
        present = restrict(graph, cut).by_name
        self._groups = {
            new: (old, self._kept.get(old, graph.by_name[old].units), present[new].units)
            for old, new in renamed(graph, cut).items()
            if not present[new].modules
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
    """The saving of each unit of ``group``, in the cost's unit: for layers, of each one; for other units, the mean over
    all units that may be removed."""
    whole = cost.remaining()
    if group.modules:
        return [cost.value(whole - cost.remaining(gone=(unit,))) for unit in range(group.units)]
    least = max(group.minimum, group.blocks if group.blocks > 1 else 1)
    if least >= group.units:
        return [0.0] * group.units
    saved = cost.value(whole - cost.remaining({group.name: least})) / (group.units - least)
    return [saved] * group.units


def saving_units(
    cost: Cost,
    groups: Sequence[CoupledGroup],
    allowed: Mapping[str, frozenset[int] | None],
    alike: Iterable[Sequence[str]] = (),
) -> dict[str, frozenset[int] | None]:
    """``allowed`` (group name → units that may be removed, None for all) without units that save nothing of ``cost``,
    and without groups that have no others. Raises `SelectionError` when no unit saves any.

    ``alike``: the names of groups that must keep the same number of units, as `Widths.alike` gives them; all of them
    stay where one saves.
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
    for names in alike:
        if any(name in found for name in names):
            found |= {name: allowed[name] for name in names if name not in found}
    return found
