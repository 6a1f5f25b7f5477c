"""Taylor importance: the estimated change of the loss when a weight is set to zero.

LLM-Pruner, equations 3 to 6: expanding the loss L around the weights W,
``L(W) − L(W: wᵢ=0) = gᵢwᵢ − ½ wᵢ Hᵢᵢ wᵢ + O(‖W‖³)``, with the Hessian's diagonal H approximated by the Fisher
information ``E[gᵢ²]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ...component import ComponentSettings
from ...engine.signals import ParameterSignals, Signal
from .base import ImportanceCriterion

if TYPE_CHECKING:
    import torch


Variant = Literal["element1", "element2", "mix", "vector"]


class Taylor(ImportanceCriterion):
    """The importance of LLM-Pruner (Ma et al., 2023) in four variants; sums are over the weights that a unit owns.

    ``element1``: Σ|g·w| (first order, per weight). ``element2``: Σ½w²·E[g²] (second order, per weight).
    ``mix``: Σ|g·w − ½w²·E[g²]|. ``vector``: |Σ g·w| per row or column (first order, for the whole vector).
    """

    name = "taylor"
    by_matrix = True
    summary = "change of the loss by Taylor expansion, |g·w| and its variants (LLM-Pruner, eq. 3-6)"

    class Settings(ComponentSettings):
        variant: Variant = Field(
            "element1",
            description="element1: first order, per weight; element2: second order, per weight; mix: both; vector: "
            "first order, per row or column.",
        )

    settings: Settings

    @property
    def signals(self) -> frozenset[Signal]:
        gradients = {
            "element1": {Signal.GRAD},
            "vector": {Signal.GRAD},
            "element2": {Signal.GRAD_SQ},
            "mix": {Signal.GRAD, Signal.GRAD_SQ},
        }[self.settings.variant]
        return frozenset({Signal.WEIGHT} | gradients)

    @property
    def signed(self) -> bool:
        return self.settings.variant == "vector"

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        weight = signals.weight
        value = weight.new_zeros(weight.shape) if signals.grad is None else weight * signals.grad
        if signals.grad_sq is not None:
            value = value - 0.5 * weight.square() * signals.grad_sq
        return value
