"""Criteria of weights: alone, with their inputs, which need a forward pass, and with gradients.

W is a weight matrix (d_out, d_in), w its weights, x_j its input channel j, and E the mean over all calibration tokens.
Scores of weights alone are sums over the weights that a unit owns; those with inputs are of the weights that read a
unit (the down projection for an MLP channel, the output projection for a head).

Optimal Brain Surgeon (``obs``) removes units one after another, always the one whose removal increases the error least,
and after each the weights of the remaining ones are fitted again. With H = E[xxᵀ] + λI and the columns u of a unit, its
removal increases the squared error of the output by E_u and changes W and H⁻¹ to

    E_u = tr(W_u [(H⁻¹)_uu]⁻¹ W_uᵀ),   W ← W − W_u [(H⁻¹)_uu]⁻¹ (H⁻¹)_u:,   H⁻¹ ← H⁻¹ − (H⁻¹)_:u [(H⁻¹)_uu]⁻¹ (H⁻¹)_u:

(Hassibi and Stork, 1993; for structures of language models: SlimGPT, Ling et al., 2024, eq. 5; ZipLM, Kurtic et al.,
2023, eq. 4).

Taylor importance is the change of the loss L when a weight is set to zero (LLM-Pruner, equations 3 to 6):
``L(W) − L(W: wᵢ=0) = gᵢwᵢ − ½ wᵢ Hᵢᵢ wᵢ + O(‖W‖³)``, with the Hessian's diagonal approximated by the Fisher information
``E[gᵢ²]``. Fisher importance is the divergence of the predictions when a unit is silenced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ...component import ComponentSettings
from ...engine.signals import InputStats, ParameterSignals, Product, Signal, UnitAxis
from ...structure.coupling import ATTENTION, QUERY, Role
from .base import ImportanceCriterion

if TYPE_CHECKING:
    import torch

Variant = Literal["element1", "element2", "mix", "vector"]


class Random(ImportanceCriterion):
    name = "random"
    summary = "uniform random numbers from [0, 1): the baseline for every other criterion"

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        values = signals.weight.new_empty(signals.weight.shape, device="cpu").uniform_(generator=signals.generator)
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
    """‖W_:j‖²·Var[x_j]: the mean squared error when a unit is replaced by its mean (FLAP; An et al., 2024, eq. 5)."""

    name = "flap"
    summary = "weight norm times fluctuation of the input, ‖W_:j‖²·Var[x_j] (FLAP, eq. 5)"

    def weigh(self, signals: ParameterSignals, inputs: InputStats) -> torch.Tensor:
        return signals.weight.square() * inputs.variance


class ActivationNorm(OfInputs):
    """E[x_j²]: mean square of a unit's activation, without weights (Minitron; Muralidharan et al., 2024, §2.2)."""

    name = "activation"
    summary = "mean square of a unit's activation, E[x_j²] (Minitron, §2.2)"

    def weigh(self, signals: ParameterSignals, inputs: InputStats) -> torch.Tensor:
        return signals.over_inputs(inputs.second_moment)


class Pca(OfInputs):
    """Σ_k λ_k v_jk² over the leading principal components v_k of the inputs, whose eigenvalues λ_k sum to a ``share``
    of the total: the mean square of a channel within the subspace that PCA keeps (SliceGPT; Ashkboos et al., 2024)."""

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


class OptimalBrainSurgeon(OutputEnergy):
    """A unit's score is the error accumulated after its removal; each removal updates the others by least squares."""

    name = "obs"
    summary = "greedy removal of units with a least-squares update of the others (OBS on the Gram matrix, SlimGPT)"
    needs = frozenset({Signal.WEIGHT, Signal.GRAM})
    by_matrix = False

    class Settings(ComponentSettings):
        ridge: float = Field(
            0.01, gt=0, description="λ, added to the diagonal of the Gram matrix, as a share of the diagonal's mean."
        )

    settings: Settings

    def score_units(self, signals: ParameterSignals, axis: UnitAxis, index_UK: torch.Tensor) -> torch.Tensor | None:
        """None for units that are not columns (experts, layers), of which `energy` is the error without an update."""
        inputs = signals.inputs
        if axis.role is None or inputs is None or inputs.gram is None or axis.axis != inputs.axis:
            return None
        weight = signals.weight if axis.axis == signals.weight.dim() - 1 else signals.weight.mT
        weight, gram = (t if t.dim() == 3 else t[None] for t in (weight, inputs.gram))
        return remove_all(weight, gram, index_UK, self.settings.ridge)


def remove_all(weight_EOI: torch.Tensor, gram_EII: torch.Tensor, index_UK: torch.Tensor, ridge: float) -> torch.Tensor:
    """Scores (units,), float64: of each unit, Σ E over those removed up to it. ``weight_EOI``: matrices of a stack,
    which lose a unit together. ``gram_EII``: E[xxᵀ] of their inputs. ``index_UK``: the columns of each unit."""
    import torch

    weight = weight_EOI.to(torch.float64, copy=True)
    hessian = gram_EII.to(torch.float64, copy=True)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    diagonal += (ridge * diagonal.mean(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    inverse = torch.linalg.inv(hessian)
    del hessian, diagonal
    units = len(index_UK)
    scores = torch.zeros(units, dtype=torch.float64, device=weight.device)
    remaining, total = list(range(units)), 0.0
    at_once = -(-units // 1024)  # units removed after each evaluation of E_u, to bound their number
    while remaining:
        index = index_UK[torch.tensor(remaining, device=index_UK.device)]
        costs = _costs(weight, inverse, index)
        order = costs.argsort(stable=True)[:at_once].tolist()
        for place in order:
            total += max(float(costs[place]), 0.0)
            scores[remaining[place]] = total
            _remove(weight, inverse, index[place])
        chosen = set(order)
        remaining = [unit for place, unit in enumerate(remaining) if place not in chosen]
    return scores


def _costs(weight: torch.Tensor, inverse: torch.Tensor, index_AK: torch.Tensor) -> torch.Tensor:
    """E_u (A,) of the units whose columns are given (A, K), summed over the stack."""
    import torch

    if index_AK.shape[1] == 1:
        column = index_AK[:, 0]
        diagonal = inverse.diagonal(dim1=-2, dim2=-1)[:, column].clamp_min(1e-300)
        return (weight[:, :, column].square().sum(1) / diagonal).sum(0)
    blocks = inverse[:, index_AK[:, :, None], index_AK[:, None, :]]
    columns = weight[:, :, index_AK].permute(0, 2, 3, 1)
    repaired: torch.Tensor = torch.linalg.solve(blocks, columns)
    return (columns * repaired).sum((0, 2, 3))


def _remove(weight: torch.Tensor, inverse: torch.Tensor, index_K: torch.Tensor) -> None:
    """Remove the columns K of one unit: update W and H⁻¹ in place, with zeros in the rows and columns of the unit."""
    import torch

    rows = inverse[:, index_K]
    block = rows[:, :, index_K]
    step = rows / block.clamp_min(1e-300) if len(index_K) == 1 else torch.linalg.solve(block, rows)
    weight -= weight[:, :, index_K] @ step
    weight[:, :, index_K] = 0
    inverse -= rows.mT @ step
    inverse[:, index_K] = 0
    inverse[:, :, index_K] = 0


class Taylor(ImportanceCriterion):
    """The importance of LLM-Pruner (Ma et al., 2023); sums are over the weights that a unit owns. ``element1``: Σ|g·w|.
    ``element2``: Σ½w²·E[g²]. ``mix``: Σ|g·w − ½w²·E[g²]|. ``vector``: |Σ g·w| per row or column."""

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

    Channels of the last layer add to the logits of a few tokens each, and a text of some thousand tokens holds few of
    these; without the channel, the token is predicted everywhere or nowhere. So the score of a channel in the last
    layer's MLP is multiplied by the square of its largest change of a single logit (`ParameterSignals.logit_peaks`), as
    a share of the mean square over the channels.
    """

    name = "fisher"
    summary = (
        "change of the predictions, (Σ_j x_j·W_:jᵀg)² of a unit at each token, from gradients (Fisher information)"
    )
    needs = frozenset({Signal.PRODUCT_GRAD, Signal.LOGIT_PEAKS})
    roles = frozenset({Role.CONSUMES})
    by_matrix = True

    def measure(self, product: Product) -> Mapping[str, torch.Tensor]:
        effects = product.inputs * product.input_grads
        sums = {"squares": effects.square().sum(0) / product.num_samples}
        if product.expert is None and product.reads & {ATTENTION, QUERY}:
            sums["products"] = effects.mT @ effects / product.num_samples
        return sums

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        if signals.products is None:
            return signals.weight.new_zeros(signals.weight.shape)
        squares = signals.products.sums["squares"].float()
        if signals.logit_peaks is not None:
            peaks = signals.logit_peaks.square().to(squares.device)
            squares = squares * (peaks / peaks.mean().clamp_min(1e-30))
        return signals.over_inputs(squares)

    def score_units(self, signals: ParameterSignals, axis: UnitAxis, index_UK: torch.Tensor) -> torch.Tensor | None:
        products = None if signals.products is None else signals.products.sums.get("products")
        if products is None or axis.role is not Role.CONSUMES:
            return None
        index = index_UK.to(products.device)
        return products[index[:, :, None], index[:, None, :]].sum((1, 2))
