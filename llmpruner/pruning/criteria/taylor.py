"""Criteria of gradients: Taylor importance (the change of the loss when a weight is set to zero), and Fisher importance
(the divergence of the predictions when a unit is silenced).

LLM-Pruner, equations 3 to 6: expanding the loss L around the weights W,
``L(W) − L(W: wᵢ=0) = gᵢwᵢ − ½ wᵢ Hᵢᵢ wᵢ + O(‖W‖³)``, with the Hessian's diagonal H approximated by the Fisher
information ``E[gᵢ²]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ...component import ComponentSettings
from ...engine.signals import ParameterSignals, Product, Signal, UnitAxis
from ...structure.coupling import ATTENTION, QUERY, Role
from .base import ImportanceCriterion

if TYPE_CHECKING:
    import torch

_HEADS = frozenset({ATTENTION, QUERY})
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
    def needs(self) -> frozenset[Signal]:
        gradients = {"element2": {Signal.GRAD_SQ}, "mix": {Signal.GRAD, Signal.GRAD_SQ}}
        return frozenset({Signal.WEIGHT, *gradients.get(self.settings.variant, {Signal.GRAD})})

    @property
    def signed(self) -> bool:
        return self.settings.variant == "vector"

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        weight = signals.weight
        value = weight.new_zeros(weight.shape) if signals.grad is None else weight * signals.grad
        if signals.grad_sq is not None:
            value = value - 0.5 * weight.square() * signals.grad_sq
        return value


class Fisher(ImportanceCriterion):
    """Σ_t (Σ_j x_tj · W_:jᵀg_t)², the mean over samples, with the inputs j of a weight that a unit owns. Times half the
    tokens of a sample, this estimates the divergence (KL, nats per token) of the predictions when the unit is silenced.

    At token t, the unit adds δ = Σ_j W_:j x_tj to the output of the weight W (d_out, d_in); g_t (d_out,) is the
    gradient of the sample's mean next-token loss there. The gradient is zero on average over predictions, so that the
    divergence begins with ½ E[(gᵀδ)²], where E[ggᵀ] is the Fisher information (Theis et al., 2018, "Faster gaze
    prediction with dense networks and Fisher pruning"; for masks of units, Kwon et al., 2022, "A Fast Post-Training
    Pruning Framework for Transformers"). Products of different tokens are left out, and those of different channels of
    units that are neither channels nor heads. The next token of the text takes the place of one that the model draws
    (the empirical Fisher information).
    """

    name = "fisher"
    summary = (
        "change of the predictions, (Σ_j x_j·W_:jᵀg)² of a unit at each token, from gradients (Fisher information)"
    )
    needs = frozenset({Signal.PRODUCT_GRAD})
    roles = frozenset({Role.CONSUMES})
    by_matrix = True

    def measure(self, product: Product) -> Mapping[str, torch.Tensor]:
        effects = product.inputs * product.input_grads
        sums = {"squares": effects.square().sum(0) / product.num_samples}
        if product.expert is None and product.reads & _HEADS:
            sums["products"] = effects.mT @ effects / product.num_samples
        return sums

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        if signals.products is None:
            return signals.weight.new_zeros(signals.weight.shape)
        return signals.over_inputs(signals.products.sums["squares"].float())

    def score_units(self, signals: ParameterSignals, axis: UnitAxis, index_UK: torch.Tensor) -> torch.Tensor | None:
        products = None if signals.products is None else signals.products.sums.get("products")
        if products is None or axis.role is not Role.CONSUMES:
            return None
        index = index_UK.to(products.device)
        return products[index[:, :, None], index[:, None, :]].sum((1, 2))
