"""Compensation: changes weights that read removed units, before the cut; the built-in ones. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ...component import Component, ComponentSettings
from ...errors import no_bias
from ...structure.coupling import CoupledGroup, CouplingGraph, Role
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
    changes_readers_alone: ClassVar[bool] = False
    """Whether it changes only weights that read removed units, and biases; ``verify`` then compares all others."""

    def check(self, graph: CouplingGraph, groups: Sequence[CoupledGroup]) -> None:
        """Raise `UnsupportedModelError`, before text is read, for units in ``groups`` that can't be compensated."""

    def repair(self, task: RepairTask) -> Sequence[Fit]:
        """Change ``task.model`` in place, and return a fit for each matrix, also where its weights stay. Raises
        `UnsupportedModelError` for a decoder that cannot run, `ModelError` for infinite hidden states."""
        raise NotImplementedError


class NoCompensation(Compensation):
    name = "none"
    summary = "weights do not change"
    reads_text = False
    by_layer = True
    changes_readers_alone = True

    def repair(self, task: RepairTask) -> Sequence[Fit]:
        return ()


class BiasShift(Compensation):
    """Adds W_R · mean(x_R) to the bias of every weight matrix W that loses the inputs x_R; means are over tokens in the
    pruned model (FLAP; An et al., 2024, equation 7). Raises `UnsupportedModelError` without a bias."""

    name = "bias"
    summary = "the mean contribution of removed units is added to the biases of the weights that read them"
    by_layer = True
    changes_readers_alone = True

    def check(self, graph: CouplingGraph, groups: Sequence[CoupledGroup]) -> None:
        """Stacks are refused: where experts have biases, they are not added by the matrix product."""
        for group in groups:
            for span in group.spans_with(Role.CONSUMES):
                name, axes = span.parameter, len(graph.shapes[span.parameter])
                alone = axes == 2 and name.endswith(".weight") and f"{name[:-6]}bias" not in graph.shapes
                if graph.is_decoder(name) and (alone or (axes == 3 and span.axis > 0)):
                    raise no_bias(name)

    def repair(self, task: RepairTask) -> Sequence[Fit]:
        from . import least_squares, repair

        return repair.repair(task, least_squares.BiasFitter)


class Refit(Compensation):
    """Fits every weight matrix that loses inputs again, with its bias, by ridge regression against the dense model
    (`compensation.least_squares`), layer by layer on the outputs of compensated layers (`compensation.repair`)."""

    name = "refit"
    summary = "weights that read removed units are fitted again by least squares against the dense model"
    by_layer = True
    changes_readers_alone = True

    class Settings(ComponentSettings):
        mix: float = Field(
            0.5,
            ge=0,
            le=1,
            description="Target of each fit: 0 is the output of the uncut layer in the pruned model; 1 also adds the "
            "whole difference of the hidden states from the dense model's.",
        )

    settings: Settings

    def repair(self, task: RepairTask) -> Sequence[Fit]:
        from . import least_squares, repair

        return repair.repair(task, least_squares.WeightFitter, mix=self.settings.mix)
