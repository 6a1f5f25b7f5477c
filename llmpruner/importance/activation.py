"""Criteria that read a forward pass: weights together with what they are multiplied with.

Notation: W of shape (out, in), X the inputs of a layer over all calibration tokens, x_j input channel j. All of them
score the weights that read a unit (down_proj for an MLP channel, o_proj for a head).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engine.signals import InputStats, ParameterSignals, Signal
from ..structure.coupling import Role
from .base import ImportanceCriterion

if TYPE_CHECKING:
    import torch

_READERS = frozenset({Role.CONSUMES})


class OfInputs(ImportanceCriterion):
    """Scores weights with their inputs, and gives zero to what is multiplied with none."""

    needs = frozenset({Signal.WEIGHT, Signal.INPUT_STATS})
    roles = _READERS

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        if signals.inputs is None:
            return signals.weight.new_zeros(signals.weight.shape)
        return self.weigh(signals.weight, signals.inputs)

    def weigh(self, weight: torch.Tensor, inputs: InputStats) -> torch.Tensor:
        """Saliency of every weight, with the shape of ``weight``."""
        raise NotImplementedError


class WandaSp(OfInputs):
    """Σᵢ |W_ij|·‖x_j‖₂: Wanda (Sun et al., 2023, eq. 1) summed over structures (An et al., 2024)."""

    name = "wanda-sp"
    summary = "weight times norm of its input, Σ|W_ij|·‖x_j‖ (Wanda, eq. 1, over structures)"

    def weigh(self, weight: torch.Tensor, inputs: InputStats) -> torch.Tensor:
        return weight.abs() * inputs.power.sqrt()


class OutputEnergy(OfInputs):
    """‖W_:j‖²·E[x_j²]: the mean square of what a unit adds to the output, if units were uncorrelated."""

    name = "energy"
    summary = "mean square of what a unit adds to the output, ‖W_:j‖²·E[x_j²]"

    def weigh(self, weight: torch.Tensor, inputs: InputStats) -> torch.Tensor:
        return weight.square() * inputs.power


class Fluctuation(OfInputs):
    """‖W_:j‖²·Var[x_j]: what is lost when a unit is replaced by its mean (FLAP's WIFV; An et al., AAAI 2024, eq. 5)."""

    name = "flap"
    summary = "weight norm times fluctuation of the input, ‖W_:j‖²·Var[x_j] (FLAP, eq. 5)"

    def weigh(self, weight: torch.Tensor, inputs: InputStats) -> torch.Tensor:
        return weight.square() * inputs.variance


class ActivationNorm(OfInputs):
    """E[x_j²]: how strongly a unit is active, whatever reads it (Minitron; Muralidharan et al., 2024, §2.2)."""

    name = "activation"
    summary = "mean square of a unit's activation, E[x_j²] (Minitron, §2.2)"

    def weigh(self, weight: torch.Tensor, inputs: InputStats) -> torch.Tensor:
        spread = weight.numel() / inputs.power.numel()
        return (inputs.power / spread).expand_as(weight)


class Pca(ImportanceCriterion):
    """Σ_k λ_k v_jk² over the leading principal components v_k of the inputs, which hold 99 % of their energy: how much
    of a channel lies in the subspace that pruning by PCA keeps of the hidden width (SliceGPT; Ashkboos et al., 2024).
    """

    name = "pca"
    summary = "energy of a channel within the leading principal components of the inputs (after SliceGPT)"
    needs = frozenset({Signal.WEIGHT, Signal.GRAM})
    roles = _READERS
    share = 0.99

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        import torch

        if signals.inputs is None or signals.inputs.gram is None:
            return signals.weight.new_zeros(signals.weight.shape)
        values, vectors = torch.linalg.eigh(signals.inputs.gram.double())
        values = values.clamp_min(0)
        # Ascending order: the components that together hold the last one per cent are dropped.
        leading = values * (values.cumsum(-1) > (1 - self.share) * values.sum(-1, keepdim=True))
        energy: torch.Tensor = (vectors.square() * leading[..., None, :]).sum(-1).float()
        shape = [1] * signals.weight.dim()
        shape[signals.inputs.axis] = energy.shape[-1]
        if energy.dim() > 1:
            shape[0] = energy.shape[0]
        spread = signals.weight.numel() / energy.numel()
        return (energy.view(shape) / spread).expand_as(signals.weight)
