"""Criteria of weights w alone; sums are over the weights that a unit owns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...engine.signals import ParameterSignals
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
    """Σ|w|."""

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
