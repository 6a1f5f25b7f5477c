"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import RecoveryJob, RecoveryStrategy, TrainingResult
from .trained_weights import TrainedWeights

if TYPE_CHECKING:
    from ..structure.coupling import CouplingGraph


class FullStrategy(RecoveryStrategy):
    name = "full"
    summary = "trains every parameter; needs about 16 bytes of memory for each"

    Settings = TrainedWeights
    settings: TrainedWeights

    @property
    def in_float32(self) -> bool:  # type: ignore[override]
        return self.settings.float32

    def trained_parameters(self, graph: CouplingGraph) -> int:
        return graph.total_parameters

    def train(self, job: RecoveryJob) -> TrainingResult:
        from .training import fit_weights

        job.model.requires_grad_(True)
        losses = fit_weights(job.model, job, float32=self.settings.float32)
        return TrainingResult(job.model, losses, sum(p.numel() for p in job.model.parameters()))
