"""Comparing the hidden states before and after layers, and blocks of layers, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan, pi
from typing import TYPE_CHECKING

import torch

from .signals import StreamStats
from .walk import Batch, ForwardWalk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.calibration import CalibrationSet
    from ..progress import Progress


@torch.no_grad()
def stream_statistics(
    model: PreTrainedModel, layers: str, calibration: CalibrationSet, progress: Progress, *, blocks: bool = False
) -> StreamStats:
    """Compare the hidden states before and after each layer; with ``blocks``, each block of consecutive layers.

    Memory: the hidden states of the whole calibration set, in float32; with ``blocks`` also those of one micro-batch
    before every layer.
    """
    walk = ForwardWalk.over(model, layers, calibration)
    count = len(walk.layers)
    lengths = count if blocks else 1
    cosine, angle = torch.full((2, lengths, count), nan, dtype=torch.float64)
    for length in range(1, lengths + 1):
        cosine[length - 1, : count - length + 1] = 0
        angle[length - 1, : count - length + 1] = 0
    # With blocks, hidden states before all layers are kept: of one micro-batch at a time.
    parts = [[batch] for batch in walk.batches] if blocks else [walk.batches]
    states = walk.take_states()
    before: list[list[torch.Tensor]] = []
    for part, number in progress.track([(p, n) for p in parts for n in range(count)], "Measuring layers"):
        if number == 0:
            before = [[states.pop(0)] for _ in part]
        cosines: list[list[torch.Tensor]] = [[] for _ in before[0]]
        for position, batch in enumerate(part):
            after = walk.run(number, batch, before[position][-1])
            for length, earlier in enumerate(reversed(before[position])):
                cosines[length].append(torch.cosine_similarity(earlier, after, dim=-1).double().flatten())
            before[position] = [*before[position], after][-lengths:]
        share = _tokens(part) / walk.tokens
        for length, found in enumerate(cosines):
            of_tokens = torch.cat(found).clamp(-1, 1)
            cosine[length, number - length] += share * float(of_tokens.mean())
            angle[length, number - length] += share * (float(of_tokens.arccos().mean()) / pi)
    return StreamStats(cosine, angle)


def _tokens(part: Sequence[Batch]) -> int:
    return sum(batch.input_ids.numel() for batch in part)
