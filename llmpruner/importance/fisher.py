"""Fisher importance: the divergence of the model's predictions when a unit is silenced, by a quadratic expansion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..engine.signals import ParameterSignals, Product, Signal
from ..structure.coupling import Role
from .base import ImportanceCriterion

if TYPE_CHECKING:
    import torch


class Fisher(ImportanceCriterion):
    """Σ_t (x_tj · W_:jᵀg_t)², the mean over samples. Times half the tokens of a sample, this estimates the divergence
    (KL, nats per token) of the predictions when channel j of the inputs of a weight is silenced.

    At token t, the channel adds W_:j x_tj to the output of the weight W (d_out, d_in); g_t (d_out,) is the gradient of
    the sample's mean next-token loss there. The gradient is zero on average over predictions, so that the divergence
    begins with ½ E[(gᵀδ)²], where δ is the change of the output and E[ggᵀ] the Fisher information (Theis et al., 2018,
    "Faster gaze prediction with dense networks and Fisher pruning", eq. 7; for masks of units, Kwon et al., 2022, "A
    Fast Post-Training Pruning Framework for Transformers", eq. 9). Products of different tokens and of different
    channels of a unit are left out: signs differ, and their sum is small. On text that the model did not write, the
    next token of the text takes the place of one that the model draws (the empirical Fisher information).

    Criteria of weights and inputs compare channels by the size of what they add; this one also by how much the
    predictions depend on it.
    """

    name = "fisher"
    summary = "change of the predictions, (x_j·W_:jᵀg)² at each token, from gradients (diagonal Fisher information)"
    needs = frozenset({Signal.PRODUCT_GRAD})
    roles = frozenset({Role.CONSUMES})
    by_matrix = True

    def measure(self, product: Product) -> Mapping[str, torch.Tensor]:
        return {"squares": (product.inputs * product.input_grads).square().sum(0) / product.num_samples}

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        if signals.products is None:
            return signals.weight.new_zeros(signals.weight.shape)
        return signals.over_inputs(signals.products.sums["squares"].float())
