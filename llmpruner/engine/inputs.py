"""What a forward pass over the calibration set tells about weights and layers, one layer at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import pi
from typing import TYPE_CHECKING

import torch

from .gram import add_gram, both_triangles
from .signals import InputStats, StreamStats
from .uses import Use, WatchUses
from .walk import ForwardWalk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.calibration import CalibrationSet
    from ..progress import Progress


@torch.no_grad()
def input_statistics(
    model: PreTrainedModel,
    layers: str,
    wanted: Collection[str],
    calibration: CalibrationSet,
    progress: Progress,
    *,
    gram: bool,
) -> Iterator[dict[str, InputStats]]:
    """For every decoder layer, the statistics of those of its ``wanted`` parameters that are matrices in use.

    Memory: the hidden states of the whole calibration set, and one layer's statistics.
    """
    walk = ForwardWalk.over(model, layers, calibration)
    tokens = calibration.input_ids.numel()
    states = [batch.hidden for batch in walk.batches]
    numbers = [number for number in range(len(walk.layers)) if _inside(wanted, layers, number)]
    for number in progress.track(range(max(numbers, default=-1) + 1), "Measuring inputs"):
        with WatchInputs(model, _inside(wanted, layers, number), gram=gram) as watched:
            states = [walk.run(number, b, hidden) for b, hidden in zip(walk.batches, states, strict=True)]
        yield watched.statistics(tokens)


class WatchInputs(WatchUses):
    """While active, sums up what the weights ``names`` are multiplied with; ``gram``: outer products too."""

    def __init__(self, model: PreTrainedModel, names: Collection[str], *, gram: bool) -> None:
        super().__init__(model, names, self._add)
        self._model, self._gram = model, gram
        self._sums: dict[str, _Sums] = {}

    def _add(self, use: Use) -> None:
        if use.parameter not in self._sums:
            self._sums[use.parameter] = _Sums.like(self._model.get_parameter(use.parameter), use, self._gram)
        self._sums[use.parameter].add(use)

    def statistics(self, tokens: int) -> dict[str, InputStats]:
        """Means over ``tokens``, of every weight that was used."""
        return {name: found.finish(tokens) for name, found in self._sums.items()}


@torch.no_grad()
def stream_statistics(
    model: PreTrainedModel, layers: str, calibration: CalibrationSet, progress: Progress
) -> list[StreamStats]:
    """How each layer turns the residual stream."""
    walk = ForwardWalk.over(model, layers, calibration)
    states = [batch.hidden for batch in walk.batches]
    found = []
    for number in progress.track(range(len(walk.layers)), "Measuring layers"):
        after = [walk.run(number, b, hidden) for b, hidden in zip(walk.batches, states, strict=True)]
        cosines = torch.cat(
            [torch.cosine_similarity(a, b, dim=-1).double().flatten() for a, b in zip(states, after, strict=True)]
        ).clamp(-1, 1)
        found.append(StreamStats(float(cosines.mean()), float(cosines.arccos().mean()) / pi))
        states = after
    return found


def _inside(wanted: Collection[str], layers: str, number: int) -> list[str]:
    return sorted(name for name in wanted if name.startswith(f"{layers}.{number}."))


@dataclass
class _Sums:
    """Sums over tokens: of inputs (slots, in), of their squares, and of outer products (slots, in, in; their lower
    triangles)."""

    axis: int
    dim: int
    total: torch.Tensor
    square: torch.Tensor
    outer: torch.Tensor | None

    @classmethod
    def like(cls, parameter: torch.Tensor, use: Use, gram: bool) -> _Sums:
        slots = parameter.shape[0] if parameter.dim() == 3 else 1
        width = use.inputs.shape[1]
        zeros = torch.zeros(slots, width, dtype=torch.float64, device=parameter.device)
        outer = torch.zeros(slots, width, width, device=parameter.device) if gram else None
        return cls(use.axis, parameter.dim(), zeros, zeros.clone(), outer)

    def add(self, use: Use) -> None:
        slot, inputs = use.slot or 0, use.inputs.float()
        self.total[slot] += inputs.sum(0, dtype=torch.float64)
        self.square[slot] += inputs.square().sum(0, dtype=torch.float64)
        if self.outer is not None:
            add_gram(self.outer[slot], inputs)

    def finish(self, tokens: int) -> InputStats:
        shape = [1] * self.dim
        shape[self.axis] = self.total.shape[1]
        if self.dim == 3:
            shape[0] = self.total.shape[0]
        gram = None if self.outer is None else both_triangles(self.outer) / tokens
        return InputStats(
            (self.total / tokens).float().view(shape),
            (self.square / tokens).float().view(shape),
            self.axis,
            gram if gram is None or self.dim == 3 else gram[0],
        )
