"""Criteria of weights w alone; sums run over what a unit owns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engine.signals import ParameterSignals, Signal
from .base import ImportanceCriterion

if TYPE_CHECKING:
    import torch


class Random(ImportanceCriterion):
    """Saliencies drawn uniformly from [0, 1): the baseline for every other criterion."""

    name = "random"
    summary = "uniform random numbers: the baseline"
    needs = frozenset({Signal.WEIGHT})

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        import torch

        values = torch.rand(signals.weight.shape, generator=signals.generator)
        return values.to(signals.weight.device)


class L1(ImportanceCriterion):
    """Σ|w|."""

    name = "l1"
    summary = "sum of absolute weights, Σ|w|"
    needs = frozenset({Signal.WEIGHT})

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        return signals.weight.abs()


class L2(ImportanceCriterion):
    """Σw², the squared norm, as the code of LLM-Pruner sums it; within one span it ranks as the norm does."""

    name = "l2"
    summary = "sum of squared weights, Σw²"
    needs = frozenset({Signal.WEIGHT})

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        return signals.weight.square()
