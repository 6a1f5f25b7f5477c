"""How the spans of a group (S spans × U units) become one score per unit."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

REDUCTION_NAMES = ("sum", "mean", "max", "prod", "last")


def reduce_spans(scores_SU: torch.Tensor, reduction: str) -> torch.Tensor:
    """Scores (S, U) reduced over the first axis to (U,). ``last`` takes the last span, as LLM-Pruner's code can."""
    if reduction == "last":
        return scores_SU[-1]
    if reduction == "max":
        return scores_SU.amax(0)
    values: torch.Tensor = getattr(scores_SU, reduction)(0)
    return values
