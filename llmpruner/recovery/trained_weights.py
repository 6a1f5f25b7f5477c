"""The setting that strategies share which train the weights of the model. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from ..component import ComponentSettings


class TrainedWeights(ComponentSettings):
    """Of strategies that train weights of the model itself."""

    float32: bool = Field(
        True,
        description="Keep weights of 16 bits in float32 while they are trained, and round them at the end; false: "
        "train them in 16 bits, which takes half of the memory and loses the updates that are smaller than their "
        "rounding, as most are at low learning rates.",
    )
