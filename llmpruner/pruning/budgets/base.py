"""Budget: what the amount to remove is a share of; Cost: that quantity as a function of how many units groups keep.

A cost is arithmetic on counts, so that allocations can evaluate thousands of selections. Imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...component import Component
from ...errors import SelectionError
from ...progress import QUIET, Progress
from ...structure.coupling import CoupledGroup, CouplingGraph
from ...structure.kept import kept_indices, layer_numbers, renamed, restrict, surviving_units

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...structure.kept import Follows


class Cost(ABC):
    """The cost of a model as a function of the number of units that its groups keep. ``label``: name of the cost;
    ``unit``: of its numbers."""

    label: str
    unit: str

    @abstractmethod
    def remaining(self, kept: Mapping[str, int] | None = None, gone: Collection[int] = ()) -> int:
        """The cost of the model with ``kept`` units (group name → number; missing groups keep all) and without the
        decoder layers ``gone`` (their numbers). An integer, so that rounding errors cannot be taken for savings."""


@dataclass(frozen=True)
class BudgetSubject:
    """The model whose cost is counted. ``model``: with its weights, or on the meta device where `Budget.from_shapes`.
    ``graph``: its coupled groups, of which ``groups`` may lose units. ``family``: for trial cuts, updates the
    attributes of modules."""

    model: PreTrainedModel
    graph: CouplingGraph
    groups: Sequence[CoupledGroup]
    family: Follows
    progress: Progress = QUIET


class Budget(Component):
    """Counts a cost of a model as a function of the number of units that each group keeps."""

    kind: ClassVar[str] = "budget"
    from_shapes: ClassVar[bool] = False
    """Whether `cost` reads shapes alone, so that it works for a model on the meta device and an amount that cannot be
    reached is refused before weights are read."""

    def cost(self, subject: BudgetSubject) -> Cost:
        """The cost. Raises `UnsupportedModelError` where it cannot be known for this model."""
        raise NotImplementedError


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


def counts(graph: CouplingGraph, kept: Mapping[str, Sequence[int]]) -> tuple[dict[str, int], set[int]]:
    """The arguments of `Cost.remaining` for a cut to ``kept`` (group name → kept units): (group name → number of kept
    units, numbers of the removed layers)."""
    axes = kept_indices(graph, kept)
    numbers: dict[str, int] = {}
    for name in kept:
        group = graph.by_name[name]
        if group.modules:
            continue
        units = surviving_units(graph, kept, group, axes)
        # A block without remaining units was removed by the enclosing group, whose number of units counts that.
        per_block = group.units // group.blocks
        numbers[name] = len(units) * group.blocks // len({u // per_block for u in units})
    return numbers, set(range(graph.num_layers)) - set(layer_numbers(graph, kept))


def savings(cost: Cost, group: CoupledGroup) -> list[float]:
    """The saving of each unit of ``group``: for layers, of each one; for other units, the mean over all units that may
    be removed."""
    whole = cost.remaining()
    if group.modules:
        return [whole - cost.remaining(gone=(unit,)) for unit in range(group.units)]
    least = max(group.minimum, group.blocks if group.blocks > 1 else 1)
    if least >= group.units:
        return [0.0] * group.units
    return [(whole - cost.remaining({group.name: least})) / (group.units - least)] * group.units


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
    saving: dict[str, frozenset[int] | None] = {}
    for group in groups:
        units = allowed[group.name]
        useful = {u for u, saved in enumerate(savings(cost, group)) if saved > 0 and (units is None or u in units)}
        if useful:
            saving[group.name] = None if len(useful) == group.units else frozenset(useful)
    if not saving:
        kinds = ", ".join(dict.fromkeys(group.kind for group in groups))
        raise SelectionError(f"{kinds} units save nothing of the {cost.label}; choose others with --kinds")
    for names in alike:
        if any(name in saving for name in names):
            saving |= {name: allowed[name] for name in names if name not in saving}
    return saving
