"""Criteria that read weights alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engine.signals import ParameterSignals, Signal
from .base import ImportanceCriterion

if TYPE_CHECKING:
    import torch


class Random(ImportanceCriterion):
    """Uniform random saliency: the baseline every criterion must beat."""

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
    """Σw² (the square of the norm, which ranks alike within a span and is what the paper's code sums)."""

    name = "l2"
    summary = "sum of squared weights, Σw²"
    needs = frozenset({Signal.WEIGHT})

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        return signals.weight.square()
