"""The built-in compensations: none, bias and refit. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from ...component import ComponentSettings
from ...errors import no_bias
from ...structure.coupling import CoupledGroup, CouplingGraph, Role
from .base import Compensation, RepairTask

if TYPE_CHECKING:
    from .least_squares import Fit


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
    repairs_each = True
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

    def repair_each(self, tasks: Sequence[RepairTask]) -> None:
        from . import least_squares, repair

        repair.repair_each(tasks, least_squares.BiasFitter)


class Refit(Compensation):
    """Fits every weight matrix that loses inputs again, with its bias, by ridge regression against the dense model
    (`compensation.least_squares`), layer by layer on the outputs of compensated layers (`compensation.repair`)."""

    name = "refit"
    summary = "weights that read removed units are fitted again by least squares against the dense model"
    by_layer = True
    repairs_each = True
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

    def repair_each(self, tasks: Sequence[RepairTask]) -> None:
        from . import least_squares, repair

        repair.repair_each(tasks, least_squares.WeightFitter, mix=self.settings.mix)
