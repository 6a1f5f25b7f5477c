"""Choosing units during a compensation, layer by layer, from the inputs of weights in the dense model.

A compensation runs the dense model over all of the calibration text, so a criterion of weights and their inputs needs
no further run. Where every group loses the same share, the numbers of units do not depend on scores: they are known
before, and the units are chosen when the compensation reaches their layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...engine.signals import InputStats, Signal
from ...structure.coupling import CoupledGroup, CouplingGraph, Role
from ...structure.scope import build_queue
from ...structure.widths import ANY, Widths
from ..criteria.base import ImportanceCriterion
from ..criteria.estimate import Scores, estimate, estimate_from
from ..selection import Spread, spread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...calibration.calibration import CalibrationSet
    from ...engine.execution import Execution
    from ...structure.kept import Kept

_INPUTS = frozenset({Signal.INPUT_STATS, Signal.GRAM})


def can_wait(criterion: ImportanceCriterion, graph: CouplingGraph, groups: Sequence[CoupledGroup]) -> bool:
    """Whether units of ``groups`` can be chosen layer by layer during a compensation: ``criterion`` needs only the
    weights that read units and the inputs of these weights, and every group is in one layer and shares no weights that
    read it with another group."""
    readers_only = criterion.roles is not None and set(criterion.roles) == {Role.CONSUMES}
    if not (readers_only and criterion.signals & _INPUTS and criterion.signals <= {Signal.WEIGHT, *_INPUTS}):
        return False
    shared = Counter(name for group in groups for name in _readers(group))
    return all(
        not group.is_normalized
        and _readers(group)
        and all(shared[name] == 1 and name.startswith(f"{graph.layers}.{group.layer}.") for name in _readers(group))
        for group in groups
    )


def _readers(group: CoupledGroup) -> set[str]:
    """The weights that read the units of ``group``."""
    return {span.parameter for span in group.spans_with(Role.CONSUMES)}


@dataclass(frozen=True)
class Chooser:
    """Ranks units by ``criterion`` (``reduction``, ``seed``: as for `estimate`), and keeps the planned number of each
    group. ``scores``: group name → how the scores of the units that were chosen so far are distributed."""

    criterion: ImportanceCriterion
    reduction: str = "sum"
    widths: Widths = ANY
    seed: int = 0
    scores: dict[str, Spread] = field(default_factory=dict)

    @property
    def gram(self) -> bool:
        """Whether the criterion needs Gram matrices of inputs."""
        return Signal.GRAM in self.criterion.signals

    def choose(
        self, model: PreTrainedModel, graph: CouplingGraph, kept: Kept, layer: int, inputs: Mapping[str, InputStats]
    ) -> dict[str, tuple[int, ...]]:
        """Group name → kept units, for the groups of ``kept`` in ``layer``. ``inputs``: parameter → statistics of its
        inputs in the dense model."""
        groups = [group for name in kept if (group := graph.by_name[name]).layer == layer]
        scores = estimate_from(inputs, model, graph, groups, self.criterion, reduction=self.reduction, seed=self.seed)
        return self._keep(groups, kept, scores)

    def choose_all(
        self,
        model: PreTrainedModel,
        graph: CouplingGraph,
        kept: Kept,
        calibration: CalibrationSet,
        execution: Execution | None = None,
    ) -> dict[str, tuple[int, ...]]:
        """The results of `choose` for all layers, without a compensation."""
        groups = [graph.by_name[name] for name in kept]
        scores = estimate(
            model, graph, groups, self.criterion, calibration,
            reduction=self.reduction, seed=self.seed, execution=execution,
        )  # fmt: skip
        return self._keep(groups, kept, scores)

    def _keep(self, groups: Sequence[CoupledGroup], kept: Kept, scores: Scores) -> dict[str, tuple[int, ...]]:
        chosen = {}
        for group in groups:
            multiple = self.widths.multiple(group)
            values = scores.by_group[group.name].tolist()
            queue = build_queue(group, values, multiple=multiple)
            chosen[group.name] = queue.kept_after(queue.steps_for(group.units - len(kept[group.name])))
            self.scores[group.name] = spread(values, chosen[group.name])
        return chosen
