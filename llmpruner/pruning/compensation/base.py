"""What a compensation is: it changes weights that read removed units before the cut. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...component import Component
from ...structure.coupling import CoupledGroup, CouplingGraph
from ...structure.kept import Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...engine.execution import Execution
    from ...engine.walk import CalibrationSet
    from .least_squares import Fit


@dataclass(frozen=True)
class RepairTask:
    """The inputs of a compensation. ``model``: the dense model, changed in place; no shape may change. ``graph``: its
    coupled groups. ``kept``: group name → the units that are kept, in ascending order, for groups that lose units.
    ``calibration``: token ids, int64 of shape (samples, length); None for a compensation that reads no text.
    ``execution``: runs the model, shows progress and keeps finished layers; None for a model in memory."""

    model: PreTrainedModel
    graph: CouplingGraph
    kept: Kept
    calibration: CalibrationSet | None
    execution: Execution | None = None


class Compensation(Component):
    """Changes the weights that read removed units to keep the outputs of each layer near the dense model's."""

    kind: ClassVar[str] = "compensation"
    hook: ClassVar[str] = "llmpruner_compensations"
    reads_text: ClassVar[bool] = True
    """Whether it needs calibration text."""
    by_layer: ClassVar[bool] = False
    """Whether it looks at weights of a layer only inside ``task.execution.weights.layer``, which may stream them."""
    repairs_each: ClassVar[bool] = False
    """Whether it has `repair_each`."""
    changes_readers_alone: ClassVar[bool] = False
    """Whether it changes only weights that read removed units, and biases; ``verify`` then compares all others."""

    def check(self, graph: CouplingGraph, groups: Sequence[CoupledGroup]) -> None:
        """Raise `UnsupportedModelError`, before text is read, for units in ``groups`` that can't be compensated."""

    def repair(self, task: RepairTask) -> Sequence[Fit]:
        """Change ``task.model`` in place, and return a fit for each matrix, also where its weights stay. Raises
        `UnsupportedModelError` for a decoder that cannot run, `ModelError` for infinite hidden states."""
        raise NotImplementedError

    def repair_each(self, tasks: Sequence[RepairTask]) -> None:
        """Do for each of ``tasks`` what `repair` would, sharing what does not depend on what is kept, and keep it in
        ``task.execution.journal``, from which `repair` takes it later. Weights end as they were."""
        raise NotImplementedError
