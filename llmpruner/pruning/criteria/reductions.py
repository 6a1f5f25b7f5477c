"""Reductions of the scores of a group's spans (S spans × U units) to one score per unit.

``prod`` is the geometric mean: it has the order of the product, as LLM-Pruner multiplies, and the scale of one span.
The product of hundreds of spans (a hidden channel has some in every layer) would be zero or infinite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def reduce_spans(scores_SU: torch.Tensor, reduction: str) -> torch.Tensor:
    """Scores (S, U) reduced over the first axis to (U,) by ``sum``, ``mean``, ``max``, ``prod`` (geometric mean), or
    ``last``: those of the last span, an option of LLM-Pruner's code."""
    if reduction == "last":
        return scores_SU[-1]
    if reduction == "max":
        return scores_SU.amax(0)
    if reduction == "prod":
        return scores_SU.abs().log().mean(0).exp() * scores_SU.sign().prod(0)
    values: torch.Tensor = getattr(scores_SU, reduction)(0)
    return values
