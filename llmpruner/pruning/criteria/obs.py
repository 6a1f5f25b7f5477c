"""Optimal Brain Surgeon (criterion ``obs``), on the Gram matrix of a weight's inputs.

Units are removed one after another, always the one whose removal increases the error least, and after each the weights
of the remaining ones are fitted again. With the weight W (d_out, d_in), its inputs x, H = E[xxᵀ] + λI and the columns u
of a unit, its removal increases the squared error of the output by E_u and changes W and H⁻¹ to

    E_u = tr(W_u [(H⁻¹)_uu]⁻¹ W_uᵀ),   W ← W − W_u [(H⁻¹)_uu]⁻¹ (H⁻¹)_u:,   H⁻¹ ← H⁻¹ − (H⁻¹)_:u [(H⁻¹)_uu]⁻¹ (H⁻¹)_u:

(Hassibi and Stork, 1993; for structures of language models: SlimGPT, Ling et al., 2024, eq. 5; ZipLM, Kurtic et al.,
2023, eq. 4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ...component import ComponentSettings
from ...engine.signals import ParameterSignals, Signal, UnitAxis
from .weights import OutputEnergy

if TYPE_CHECKING:
    import torch

_STEPS = 1024
"""Maximum evaluations of E_u: with more units, several are removed after each."""


class OptimalBrainSurgeon(OutputEnergy):
    """A unit's score is the error that has accumulated after its removal, with a least-squares update of the other
    weights after each."""

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


def remove_all(weight_SOI: torch.Tensor, gram_SII: torch.Tensor, index_UK: torch.Tensor, ridge: float) -> torch.Tensor:
    """Scores (units,), float64: for each unit, Σ E over the units removed up to and including it.

    ``weight_SOI``: S matrices in a stack; a unit is removed from all of them at once. ``gram_SII``: E[xxᵀ] of their
    inputs. ``index_UK``: the columns of each unit. ``ridge``: λ as a share of the mean diagonal.
    """
    import torch

    weight = weight_SOI.to(torch.float64, copy=True)
    hessian = gram_SII.to(torch.float64, copy=True)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    diagonal += (ridge * diagonal.mean(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    inverse = torch.linalg.inv(hessian)
    del hessian, diagonal
    units = len(index_UK)
    scores = torch.zeros(units, dtype=torch.float64, device=weight.device)
    remaining, total, at_once = list(range(units)), 0.0, -(-units // _STEPS)
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
