"""Comparing the hidden states before and after layers, and blocks of layers, token by token."""

from __future__ import annotations

from math import nan, pi
from typing import TYPE_CHECKING

import torch

from .signals import StreamStats
from .walk import ForwardWalk

if TYPE_CHECKING:
    from ..calibration.calibration import CalibrationSet
    from ..progress import Progress
    from .execution import Execution


@torch.no_grad()
def stream_statistics(
    execution: Execution, calibration: CalibrationSet, progress: Progress, *, blocks: bool = False
) -> StreamStats:
    """Compare the hidden states before and after each layer; with ``blocks``, each block of consecutive layers.

    Memory: the hidden states of the whole calibration set in float32, up to the limit of the execution; with ``blocks``
    those before every layer, and every layer is compared with all earlier ones.
    """
    walk = ForwardWalk.over(execution, calibration)
    count = len(walk.layers)
    lengths = count if blocks else 1
    cosine, angle = torch.full((2, lengths, count), nan, dtype=torch.float64)
    before = [walk.embedded]
    for number in progress.track(range(count), "Measuring layers"):
        # One value for each token of the calibration set, in order; each process fills in its own.
        cosines = torch.zeros(len(before), walk.tokens, dtype=torch.float64)
        after = before[-1].beside(continued=True)
        with walk.layer(number):
            for position, batch in enumerate(walk.batches):
                states = walk.run(number, batch, before[-1][position], after.passed)
                first = batch.first * batch.input_ids.shape[1]
                tokens = slice(first, first + batch.input_ids.numel())
                for length, earlier in enumerate(reversed(before)):
                    found = torch.cosine_similarity(earlier[position], states, dim=-1)
                    # Some models put prompts of their own before the text (CPM-Ant).
                    cosines[length, tokens] = found[:, -batch.input_ids.shape[1] :].flatten()
                after.append(states)
        walk.ranks.sum_([cosines])
        before = [*before, after][-lengths:]
        for length, of_length in enumerate(cosines):
            of_tokens = of_length.clamp(-1, 1)
            cosine[length, number - length] = float(of_tokens.mean())
            angle[length, number - length] = float(of_tokens.arccos().mean()) / pi
    return StreamStats(cosine, angle)
