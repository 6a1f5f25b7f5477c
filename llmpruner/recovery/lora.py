"""LoRA: low-rank adapters on the linear layers of coupled groups. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from ..component import ComponentSettings
from .base import RecoveryJob, RecoveryStrategy, TrainingResult


class LoraStrategy(RecoveryStrategy):
    """LoRA (Hu et al., 2021) as in LLM-Pruner, section 3.3, with its defaults."""

    name = "lora"
    adapters = True
    summary = "trains low-rank adapters beside the decoder's linear layers, and merges them (Hu et al., 2021)"

    class Settings(ComponentSettings):
        rank: int = Field(8, ge=1, le=16_384, description="Rank of the adapters.")
        alpha: int = Field(16, ge=1, description="Scale of the adapters: their product is multiplied by alpha / rank.")
        dropout: float = Field(0.05, ge=0, lt=1, description="Dropout of the adapters' inputs, while training.")
        rslora: bool = Field(
            False,
            description="Multiply by alpha / √rank, so that updates do not shrink with the rank (Kalajdzievski, 2023).",
        )
        dora: bool = Field(
            False,
            description="Adapt the directions of a weight's rows, and train their lengths beside (Liu et al., 2024); "
            "slower.",
        )

    settings: Settings

    def train(self, job: RecoveryJob) -> TrainingResult:
        from .adapters import train_adapters

        return train_adapters(job, **dict(self.settings))
