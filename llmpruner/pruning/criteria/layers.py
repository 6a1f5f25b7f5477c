"""Criteria for layers: how much a layer, or a block of layers, changes the hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...engine.signals import Signal, StreamStats
from ...errors import SelectionError
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
        return 1.0 - stream.cosine


class AngularDistance(ImportanceCriterion):
    """E[arccos cos(h_l, h_l+1)]/π over tokens: the angular distance of Gromov et al. (2024, eq. 7) for n = 1."""

    name = "angular"
    summary = "for layers: mean angle between the hidden states before and after, in units of π (Gromov et al., eq. 7)"
    needs = frozenset({Signal.STREAM})

    def score_layers(self, stream: StreamStats) -> torch.Tensor:
        return stream.angle


class AngularBlock(ImportanceCriterion):
    """The least angular distance E[arccos cos(h_l, h_l+n)]/π of all blocks l … l+n−1 of removable layers that a layer
    is in, n being the number of layers that go: so these are one block, the one whose output is nearest to its input
    (Gromov et al., 2024, algorithm 1). `AngularDistance` scores each layer alone, and may remove layers that change
    little by themselves and much together. Hidden states before n layers are kept, in memory up to a limit."""

    name = "angular-block"
    summary = "for layers: the block of n layers with the least angle between its input and output (Gromov et al.)"
    needs = frozenset({Signal.STREAM_BLOCKS})

    def score_layers(self, stream: StreamStats) -> torch.Tensor:
        n, layers = stream.length, len(stream.angle)
        removable = range(layers) if stream.removable is None else stream.removable
        blocks = [list(range(start, start + n)) for start in range(layers - n + 1)]
        blocks = [block for block in blocks if all(layer in removable for layer in block)]
        if not blocks:
            raise SelectionError(
                f"criterion {self.name} removes a block of layers, and no {n} successive layers may be removed; choose "
                "fewer layers, or more with --set prune.layers"
            )
        # Beyond any angle, so that layers outside of all blocks go last.
        scores = stream.angle.new_full((layers,), 2.0)
        for block in blocks:
            scores[block] = scores[block].clamp_max(stream.angle[block[0]])
        return scores
