"""Taylor importance: the estimated change of the loss when a weight is set to zero.

LLM-Pruner, equations 3 to 6: expanding the loss L around the weights W,
``L(W) − L(W: wᵢ=0) = gᵢwᵢ − ½ wᵢ Hᵢᵢ wᵢ + O(‖W‖³)``, with the Hessian's diagonal H approximated by the Fisher
information ``E[gᵢ²]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engine.signals import ParameterSignals, Signal
from .base import ImportanceCriterion

if TYPE_CHECKING:
    import torch


class Taylor(ImportanceCriterion):
    """The paper's importance in its four variants.

    ``element1``: Σ|g·w| (first order, per weight). ``element2``: Σ½w²·E[g²] (second order, per weight).
    ``mix``: Σ|g·w − ½w²·E[g²]|. ``vector``: |Σ g·w| per row or column (first order, for the whole vector).
    """

    name = "taylor"
    summary = "change of the loss by Taylor expansion, |g·w| and its variants (LLM-Pruner, eq. 3-6)"
    variants = ("element1", "element2", "mix", "vector")

    @property
    def signals(self) -> frozenset[Signal]:
        return {
            "element1": frozenset({Signal.WEIGHT, Signal.GRAD}),
            "vector": frozenset({Signal.WEIGHT, Signal.GRAD}),
            "element2": frozenset({Signal.WEIGHT, Signal.GRAD_SQ}),
            "mix": frozenset({Signal.WEIGHT, Signal.GRAD, Signal.GRAD_SQ}),
        }[str(self.variant)]

    @property
    def signed(self) -> bool:
        return self.variant == "vector"

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        import torch

        weight = signals.weight
        value = torch.zeros_like(weight) if signals.grad is None else weight * signals.grad
        if signals.grad_sq is not None:
            value = value - 0.5 * weight.square() * signals.grad_sq
        return value
