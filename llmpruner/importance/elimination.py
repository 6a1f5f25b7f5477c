"""Optimal Brain Surgeon on the Gram matrix: units go one after another, and what stays makes up for each.

Removing a unit's columns W_u from a layer with inputs X and re-fitting the others costs, with H = XXᵀ + λI,

    E_u = tr(W_u [(H⁻¹)_uu]⁻¹ W_uᵀ),   W ← W − W_u [(H⁻¹)_uu]⁻¹ (H⁻¹)_u:,

(Hassibi and Stork, 1993; for structures of a language model: SlimGPT, Ling et al., 2024, eq. 5; ZipLM, Kurtic et al.,
2023, eq. 4). A unit's score is the error that has built up when its turn comes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engine.signals import ParameterSignals, Signal
from ..structure.coupling import Role
from .base import ImportanceCriterion

if TYPE_CHECKING:
    import torch

_RIDGE = 0.01
_STEPS = 1024


class Elimination(ImportanceCriterion):
    """The error that has built up in the layer's output when the unit's turn to go comes."""

    name = "obs"
    summary = "greedy removal of the unit whose loss the others make up best (OBS on the Gram matrix, SlimGPT)"
    needs = frozenset({Signal.WEIGHT, Signal.GRAM})
    roles = frozenset({Role.CONSUMES})

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        """Where columns are no units (experts, layers): ``W²·E[x²]``, the cost of removal without any repair."""
        if signals.inputs is None:
            return signals.weight.new_zeros(signals.weight.shape)
        return signals.weight.square() * signals.inputs.power

    def score_units(self, signals: ParameterSignals, axis: int, index_UK: torch.Tensor) -> torch.Tensor | None:
        inputs = signals.inputs
        if inputs is None or inputs.gram is None or axis != inputs.axis:
            return None
        weight = signals.weight if axis == signals.weight.dim() - 1 else signals.weight.mT
        weight, gram = (t if t.dim() == 3 else t[None] for t in (weight, inputs.gram))
        return _eliminate(weight, gram, index_UK)


def _eliminate(weight_SOI: torch.Tensor, gram_SII: torch.Tensor, index_UK: torch.Tensor) -> torch.Tensor:
    """Scores (units,), float64. S: matrices in the stack, whose units of one number go together."""
    import torch

    weight = weight_SOI.double().clone()
    hessian = gram_SII.double().clone()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    diagonal += (_RIDGE * diagonal.mean(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    inverse = torch.linalg.inv(hessian)
    units, width = index_UK.shape
    scores = torch.zeros(units, dtype=torch.float64, device=weight.device)
    alive = list(range(units))
    total = 0.0
    at_once = -(-units // _STEPS)
    while alive:
        index = index_UK[torch.tensor(alive, device=index_UK.device)]
        costs = _costs(weight, inverse, index)
        order = costs.argsort(stable=True)[:at_once].tolist()
        for place in order:
            total += max(float(costs[place]), 0.0)
            scores[alive[place]] = total
            _remove(weight, inverse, index[place], width)
        chosen = set(order)
        alive = [unit for place, unit in enumerate(alive) if place not in chosen]
    return scores


def _costs(weight: torch.Tensor, inverse: torch.Tensor, index_AK: torch.Tensor) -> torch.Tensor:
    """E_u of every unit that is still there, summed over the stack."""
    import torch

    if index_AK.shape[1] == 1:
        column = index_AK[:, 0]
        diagonal = inverse.diagonal(dim1=-2, dim2=-1)[:, column].clamp_min(1e-300)
        return (weight[:, :, column].square().sum(1) / diagonal).sum(0)
    blocks = inverse[:, index_AK[:, :, None], index_AK[:, None, :]]
    columns = weight[:, :, index_AK].permute(0, 2, 3, 1)
    repaired: torch.Tensor = torch.linalg.solve(blocks, columns)
    return (columns * repaired).sum((0, 2, 3))


def _remove(weight: torch.Tensor, inverse: torch.Tensor, index_K: torch.Tensor, width: int) -> None:
    """Take a unit out: the other weights make up for it, and the inverse becomes that of the smaller problem."""
    import torch

    rows = inverse[:, index_K]
    block = rows[:, :, index_K]
    step = rows / block.clamp_min(1e-300) if width == 1 else torch.linalg.solve(block, rows)
    weight -= weight[:, :, index_K] @ step
    weight[:, :, index_K] = 0
    inverse -= rows.mT @ step
    inverse[:, index_K] = 0
    inverse[:, :, index_K] = 0
