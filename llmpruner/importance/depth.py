"""Criteria for layers: how much a layer changes the hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engine.signals import Signal, StreamStats
from .base import ImportanceCriterion

if TYPE_CHECKING:
    import torch


class BlockInfluence(ImportanceCriterion):
    """1 − E[cos(h_l, h_l+1)] over tokens, h_l the hidden states before layer l: the block influence of ShortGPT (Men et
    al., 2024, eq. 1)."""

    name = "block-influence"
    summary = "for layers: 1 − mean cosine of the hidden states before and after (ShortGPT, eq. 1)"
    needs = frozenset({Signal.STREAM})

    def score_layers(self, stream: StreamStats) -> torch.Tensor:
        return 1.0 - stream.cosine[0]


class AngularDistance(ImportanceCriterion):
    """E[arccos cos(h_l, h_l+1)]/π over tokens: the angular distance of Gromov et al. (2024, eq. 7) for n = 1."""

    name = "angular"
    summary = "for layers: mean angle between the hidden states before and after, in units of π (Gromov et al., eq. 7)"
    needs = frozenset({Signal.STREAM})

    def score_layers(self, stream: StreamStats) -> torch.Tensor:
        return stream.angle[0]
