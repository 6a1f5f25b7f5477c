"""Criteria for whole layers: how much a layer turns the residual stream."""

from __future__ import annotations

from ..engine.signals import Signal, StreamStats
from .base import ImportanceCriterion


class BlockInfluence(ImportanceCriterion):
    """1 − E[cos(h_l, h_l+1)]: ShortGPT's block influence (Men et al., 2024, eq. 1)."""

    name = "block-influence"
    summary = "for layers: 1 − mean cosine between the stream before and after (ShortGPT, eq. 1)"
    needs = frozenset({Signal.STREAM})

    def score_layer(self, stream: StreamStats) -> float:
        return 1.0 - stream.cosine


class AngularDistance(ImportanceCriterion):
    """E[arccos cos(h_l, h_l+1)]/π: the angular distance of Gromov et al. (2024, eq. 7), for single layers."""

    name = "angular"
    summary = "for layers: mean angle between the stream before and after, in units of π (Gromov et al., eq. 7)"
    needs = frozenset({Signal.STREAM})

    def score_layer(self, stream: StreamStats) -> float:
        return stream.angle
