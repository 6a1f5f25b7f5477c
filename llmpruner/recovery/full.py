"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import RecoveryJob, RecoveryStrategy, TrainingResult

if TYPE_CHECKING:
    from ..structure.coupling import CouplingGraph


class FullStrategy(RecoveryStrategy):
    name = "full"
    summary = "trains every parameter; needs about four times the memory of the weights"

    def trained_parameters(self, graph: CouplingGraph) -> int:
        return graph.total_parameters

    def train(self, job: RecoveryJob) -> TrainingResult:
        from .training import fit

        job.model.requires_grad_(True)
        losses = fit(job.model, job)
        return TrainingResult(job.model, losses, sum(p.numel() for p in job.model.parameters()))
