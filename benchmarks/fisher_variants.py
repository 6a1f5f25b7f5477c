"""Variants of the criterion `fisher` for `benchmarks.ablation`: they did not help, so that the package does not have
them.

At a token, channel j of an input x adds e_j = x_j·(Wᵀg)_j to the loss, to first order; `fisher` is E[e_j²].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmpruner import ImportanceCriterion, ParameterSignals, Product, hookimpl
from llmpruner.engine.position import UnitAxis
from llmpruner.pruning.criteria.fisher import Fisher
from llmpruner.structure.coupling import Role

RIDGE = 0.01
"""Of the Gram matrix, as a share of the mean of its diagonal."""


class FisherAndEnergy(Fisher):
    """The geometric mean of E[e_j²] and ‖W_:j‖²·E[x_j²]."""

    name = "fisher-and-energy"
    summary = "geometric mean of fisher and energy"

    def measure(self, product: Product) -> Mapping[str, torch.Tensor]:
        return {**super().measure(product), "energy": product.inputs.square().sum(0)}

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        if signals.products is None:
            return signals.weight.new_zeros(signals.weight.shape)
        sums = signals.products.sums
        energy = sums["energy"] * signals.weight.double().square().sum(1 - signals.products.axis)
        return signals.over_inputs((sums["squares"] * energy).sqrt().float())


class FisherOfTheRest(Fisher):
    """E[e_j²] times the share of x_j that the other inputs do not predict, 1 / ((G⁻¹)_jj·G_jj) with the Gram matrix G
    of the inputs: what a fit of the weights that stay cannot give back."""

    name = "fisher-of-the-rest"
    summary = "fisher of what the other channels do not predict"

    def measure(self, product: Product) -> Mapping[str, torch.Tensor]:
        return {**super().measure(product), "gram": product.inputs.mT @ product.inputs}

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        if signals.products is None:
            return signals.weight.new_zeros(signals.weight.shape)
        sums = signals.products.sums
        gram = sums["gram"].clone()
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        rest = 1 / (torch.linalg.inv(gram).diagonal() * gram.diagonal())
        return signals.over_inputs((sums["squares"] * rest).float())


class FisherTogether(Fisher):
    """Channels are removed one after another, each time the one that raises E[(Σ e)²] of all removed ones least. The
    score of a channel is its place in this order."""

    name = "fisher-together"
    summary = "fisher of all removed channels together, greedily"

    def measure(self, product: Product) -> Mapping[str, torch.Tensor]:
        effects = product.inputs * product.input_grads
        return {"squares": effects.square().sum(0), "products": effects.mT @ effects}

    def score_units(self, signals: ParameterSignals, axis: UnitAxis, index_UK: torch.Tensor) -> torch.Tensor | None:
        if signals.products is None or axis.role is not Role.CONSUMES or index_UK.shape[1] != 1:
            return None
        products = signals.products.sums["products"][index_UK, index_UK.mT]
        added, places = products.diagonal().clone(), torch.zeros(len(products), dtype=torch.float64)
        for place in range(len(products)):
            unit = int(added.argmin())
            places[unit] = place + 1
            added += 2 * products[unit]
            added[unit] = torch.inf
        return places


@hookimpl
def llmpruner_importance_criteria() -> list[type[ImportanceCriterion]]:
    return [FisherAndEnergy, FisherOfTheRest, FisherTogether]
