"""Criteria of weights, and of weights and their inputs, which need a forward pass.

W is a weight matrix (d_out, d_in), w its weights, x_j its input channel j, and E the mean over all calibration tokens.
Scores of weights alone are sums over the weights that a unit owns; those with inputs are of the weights that read a
unit (the down projection for an MLP channel, the output projection for a head).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ...component import ComponentSettings
from ...engine.signals import InputStats, ParameterSignals, Signal
from ...structure.coupling import Role
from .base import ImportanceCriterion

if TYPE_CHECKING:
    import torch


class Random(ImportanceCriterion):
    """Saliencies drawn uniformly from [0, 1): the baseline for every other criterion."""

    name = "random"
    summary = "uniform random numbers: the baseline"

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        import torch

        values = torch.rand(signals.weight.shape, generator=signals.generator)
        return values.to(signals.weight.device)


class L1(ImportanceCriterion):
    name = "l1"
    by_matrix = True
    summary = "sum of absolute weights, Σ|w|"

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        return signals.weight.abs()


class L2(ImportanceCriterion):
    """Σw², the squared norm, as in the code of LLM-Pruner; within one span the ranking is that of the norm."""

    name = "l2"
    by_matrix = True
    summary = "sum of squared weights, Σw²"

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        return signals.weight.square()


class OfInputs(ImportanceCriterion):
    """Scores weights by their inputs, and parameters that are not used in matrix products by zero."""

    needs = frozenset({Signal.WEIGHT, Signal.INPUT_STATS})
    roles = frozenset({Role.CONSUMES})
    by_matrix = True

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        if signals.inputs is None:
            return signals.weight.new_zeros(signals.weight.shape)
        return self.weigh(signals, signals.inputs)

    def weigh(self, signals: ParameterSignals, inputs: InputStats) -> torch.Tensor:
        """Saliency of every weight, with the shape of ``signals.weight``."""
        raise NotImplementedError


class WandaSp(OfInputs):
    """Σᵢ |W_ij|·‖x_j‖₂: Wanda (Sun et al., 2023, eq. 1) summed over structures (An et al., 2024)."""

    name = "wanda-sp"
    summary = "weight times norm of its input, Σ|W_ij|·‖x_j‖ (Wanda, eq. 1, over structures)"

    def weigh(self, signals: ParameterSignals, inputs: InputStats) -> torch.Tensor:
        return signals.weight.abs() * inputs.second_moment.sqrt()


class OutputEnergy(OfInputs):
    name = "energy"
    summary = "mean square of what a unit adds to the output, ‖W_:j‖²·E[x_j²]"

    def weigh(self, signals: ParameterSignals, inputs: InputStats) -> torch.Tensor:
        return signals.weight.square() * inputs.second_moment


class Fluctuation(OfInputs):
    """‖W_:j‖²·Var[x_j]: the mean squared error when a unit is replaced by its mean (WIFV of FLAP; An et al., AAAI 2024,
    eq. 5)."""

    name = "flap"
    summary = "weight norm times fluctuation of the input, ‖W_:j‖²·Var[x_j] (FLAP, eq. 5)"

    def weigh(self, signals: ParameterSignals, inputs: InputStats) -> torch.Tensor:
        return signals.weight.square() * inputs.variance


class ActivationNorm(OfInputs):
    """E[x_j²]: the mean square of a unit's activation, independent of weights (Minitron; Muralidharan et al., 2024,
    §2.2)."""

    name = "activation"
    summary = "mean square of a unit's activation, E[x_j²] (Minitron, §2.2)"

    def weigh(self, signals: ParameterSignals, inputs: InputStats) -> torch.Tensor:
        return signals.over_inputs(inputs.second_moment)


class Pca(OfInputs):
    """Σ_k λ_k v_jk² over the leading principal components v_k of the inputs, whose eigenvalues λ_k sum to a ``share``
    of the total: the mean square of a channel within the subspace that pruning by PCA keeps (SliceGPT; Ashkboos et al.,
    2024).
    """

    name = "pca"
    summary = "energy of a channel within the leading principal components of the inputs (after SliceGPT)"
    needs = frozenset({Signal.WEIGHT, Signal.GRAM})
    by_matrix = False

    class Settings(ComponentSettings):
        share: float = Field(0.99, gt=0, le=1, description="Share of the inputs' energy in the leading components.")

    settings: Settings

    def weigh(self, signals: ParameterSignals, inputs: InputStats) -> torch.Tensor:
        import torch

        assert inputs.gram is not None, "Signal.GRAM is needed"
        values, vectors = torch.linalg.eigh(inputs.gram.double())
        values = values.clamp_min(0)
        # Eigenvalues are in ascending order: the smallest are dropped, up to the rest of the energy.
        rest = (1 - self.settings.share) * values.sum(-1, keepdim=True)
        leading = values * (values.cumsum(-1) > rest)
        energy: torch.Tensor = (vectors.square() * leading[..., None, :]).sum(-1).float()
        return signals.over_inputs(energy)
