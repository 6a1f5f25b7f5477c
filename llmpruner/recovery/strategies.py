"""The built-in strategies: full, lora and distil. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..component import ComponentSettings
from .base import RecoveryJob, RecoveryStrategy, TrainingResult

if TYPE_CHECKING:
    from ..structure.coupling import CouplingGraph


class AdapterSettings(ComponentSettings):
    """Of low-rank adapters."""

    rank: int = Field(8, ge=1, le=16_384, description="Rank of the adapters.")
    alpha: int = Field(16, ge=1, description="Scale of the adapters: their product is multiplied by alpha / rank.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout of the adapters' inputs, while training.")


class FullStrategy(RecoveryStrategy):
    """Every weight is trained on the next tokens of the data."""

    name = "full"
    summary = "trains every parameter; needs about 16 bytes of memory for each"

    def trained_parameters(self, graph: CouplingGraph) -> int:
        return graph.total_parameters

    def train(self, job: RecoveryJob) -> TrainingResult:
        from .training import fit

        job.model.requires_grad_(True)
        return TrainingResult(job.model, fit(job.model, job), job.model.num_parameters())


class LoraStrategy(RecoveryStrategy):
    """LoRA (Hu et al., 2021) as in LLM-Pruner, section 3.3, with its defaults. Stacked weights of experts get no
    adapters."""

    name = "lora"
    adapters = True
    summary = "trains low-rank adapters of the decoder's linear layers, and merges them (Hu et al., 2021)"

    Settings = AdapterSettings
    settings: AdapterSettings

    def train(self, job: RecoveryJob) -> TrainingResult:
        from .lora import train_adapters

        return train_adapters(job, self.settings)


class DistilSettings(AdapterSettings):
    """Of `DistilStrategy`; those of adapters are for ``trains=lora``."""

    trains: Literal["all", "lora"] = Field("all", description="What is trained: all weights, or LoRA adapters.")
    labels: float = Field(
        0.0, ge=0, lt=1, description="Weight of the cross entropy of the next token; the divergence has the rest."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the adapters' inputs, while training.")


class DistilStrategy(RecoveryStrategy):
    """Knowledge distillation (Hinton, Vinyals, Dean, 2015): at every token of the data, the pruned model is trained
    toward the dense model's distribution over the vocabulary.

    The loss is the mean over trained tokens of KL(p ‖ q), with the predictions p of the dense and q of the pruned
    model. The dense model is in memory together with the pruned one.
    """

    name = "distil"
    needs_dense = True
    summary = "trains toward the predictions of the dense model (Hinton et al., 2015)"

    Settings = DistilSettings
    settings: DistilSettings

    @property
    def adapters(self) -> bool:  # type: ignore[override]
        return self.settings.trains == "lora"

    def trained_parameters(self, graph: CouplingGraph) -> int:
        return 0 if self.adapters else graph.total_parameters

    def train(self, job: RecoveryJob) -> TrainingResult:
        from .lora import train_adapters
        from .losses import distillation_loss
        from .training import fit

        loss = distillation_loss(job, self.settings.labels)
        if self.adapters:
            return train_adapters(job, self.settings, loss)
        job.model.requires_grad_(True)
        return TrainingResult(job.model, fit(job.model, job, loss), job.model.num_parameters())
