"""Bias shift: the mean contribution of removed units is added to biases. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .base import Compensation, Repaired, RepairTask
from .biases import check_biases

if TYPE_CHECKING:
    from ...structure.coupling import CoupledGroup, CouplingGraph


class BiasShift(Compensation):
    """Adds W_R · mean(x_R) to the bias of every weight matrix W that loses the inputs x_R, with the mean over the
    calibration tokens in the pruned model (FLAP; An et al., 2024, equation 7). Weights do not change. Raises
    `UnsupportedModelError` where a weight has no bias."""

    name = "bias"
    summary = "the mean contribution of removed units is added to the biases of the weights that read them"
    by_layer = True
    changes_readers_alone = True

    def check(self, graph: CouplingGraph, groups: Sequence[CoupledGroup]) -> None:
        check_biases(graph, groups)

    def repair(self, task: RepairTask) -> Repaired:
        from . import fitters, repair

        return repair.repair(task, fitters.BiasFitter)
