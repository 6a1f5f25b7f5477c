"""What a distillation is set by. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .trained_weights import TrainedWeights


class DistilSettings(TrainedWeights):
    """Of `DistilStrategy`."""

    trains: Literal["all", "touched", "lora"] = Field(
        "all",
        description="What is trained: all weights, those whose shape the cut changed (touched), or LoRA adapters "
        "(lora).",
    )
    temperature: float = Field(1.0, gt=0, description="T, by which the logits of both models are divided.")
    divergence: Literal["forward", "reverse", "mixed"] = Field(
        "forward", description="forward: KL(p ‖ q); reverse: KL(q ‖ p); mixed: the mean of both."
    )
    labels: float = Field(
        0.0, ge=0, lt=1, description="Weight of the cross entropy of the next token; the divergence has the rest."
    )
    hidden: float = Field(
        0.0,
        ge=0,
        description="Weight of the squared differences of the hidden states after every layer, relative to the "
        "dense model's.",
    )
    top: int = Field(
        0,
        ge=0,
        description="Number of the dense model's most likely tokens whose probabilities are kept on disk, with the "
        "rest as one; 0: it computes all of them in every step.",
    )
    rank: int = Field(8, ge=1, le=16_384, description="Rank of the adapters, with trains=lora.")
    alpha: int = Field(16, ge=1, description="Scale of the adapters, with trains=lora.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the adapters' inputs, with trains=lora.")
    rslora: bool = Field(False, description="Multiply adapters by alpha / √rank, with trains=lora.")
    dora: bool = Field(False, description="Train lengths of weights' rows beside (DoRA), with trains=lora.")
