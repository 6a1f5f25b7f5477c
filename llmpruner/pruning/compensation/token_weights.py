"""Weights of calibration tokens: how much the cut changes the prediction at each.

Most of the damage of a cut is at few tokens, and the others decide a fit in which all count alike. The
weights are the divergences KL(dense ‖ probe) at each token, where the *probe* is the model with the planned cut and
with weights that are fitted from the Gram matrices of their inputs alone (`compensation.gram_fit`). After
RECAL (2026), which weights its calibration statistics in this way.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch

from ...engine.products import WatchProducts
from ...engine.statistics import InputSums, divergences
from ...engine.walk import ForwardWalk
from ...structure.kept import removed_layers
from .consumers import Consumer, consumers_of, zero_inputs
from .gram_fit import fitted
from .silencing import Originals, ProducerRows, removed_channels

if TYPE_CHECKING:
    from ...engine.boundaries import States
    from ...engine.execution import Execution
    from ...engine.signals import InputStats
    from .base import RepairTask

LARGEST = 8.0
"""The largest weight: rare tokens whose prediction changes completely would decide the fit alone."""


@torch.no_grad()
def token_weights(task: RepairTask, execution: Execution) -> torch.Tensor:
    """float32 (samples, length), with mean 1, the same in all processes. The model is as before afterwards. An
    interrupted run's weights are used again.

    Memory beyond the model: the hidden states of two models, up to the execution's limit; the Gram matrices (in, in) of
    one layer in float32; the logits of a sample, several times.
    """
    assert task.calibration is not None
    earlier = None if task.journal is None else task.journal.load("token_weights")
    if earlier is not None:
        return torch.tensor(earlier)
    walk = ForwardWalk.over(execution, task.calibration)
    dense, probe = _Probe(task, walk).states()
    found = torch.zeros(task.calibration.input_ids.shape)
    with execution.weights.outside():
        for batch, wanted, changed in zip(walk.batches, dense, probe, strict=True):
            for row in range(len(wanted)):
                pair = (walk.logits(batch, row, hidden) for hidden in (wanted[row], changed[row]))
                found[batch.first + row] = divergences(*pair)
    walk.ranks.sum_([found])
    weights = normalized(found)
    if task.journal is not None:
        task.journal.store("token_weights", weights.tolist())
    return weights


def normalized(divergence: torch.Tensor) -> torch.Tensor:
    """Weights with mean 1 in proportion to ``divergence``, at most `LARGEST` times its mean; all 1 where it is zero."""
    mean = float(divergence.clamp_min(0).double().mean())
    if not mean:
        return torch.ones_like(divergence)
    weights = (divergence.clamp_min(0) / mean).clamp_max(LARGEST)
    return weights / float(weights.double().mean())


class _Probe:
    """Runs the dense model and the probe side by side. With a chooser, units are chosen as the compensation will."""

    def __init__(self, task: RepairTask, walk: ForwardWalk) -> None:
        self.model, self.graph, self.kept, self.chooser = task.model, task.graph, dict(task.kept), task.chooser
        self.walk, self.progress = walk, task.progress
        self.dense = walk.embedded
        self.pruned: States | None = None
        if len(removed_channels(self.graph, self.kept)):
            self._keep_apart()

    def states(self) -> tuple[States, States]:
        """The hidden states after the last layer, of the dense model and of the probe."""
        removed = removed_layers(self.graph, self.kept)
        for number in self.progress.track(range(self.graph.num_layers), "Weighing tokens"):
            with self.walk.layer(number):
                if number in removed:
                    self._keep_apart()
                    self.walk.advance(number, self.dense)
                else:
                    self._layer(number)
        return self.dense, self._keep_apart()

    def _keep_apart(self) -> States:
        if self.pruned is None:
            self.pruned = self.dense.beside()
            gone = removed_channels(self.graph, self.kept)
            for hidden in self.dense:
                self.pruned.append(hidden.index_fill(-1, gone.to(hidden.device), 0.0))
        return self.pruned

    def _layer(self, number: int) -> None:
        consumers = consumers_of(self.graph, self.kept, number)
        if consumers:
            self._keep_apart()
        inside = [name for name, consumer in consumers.items() if not consumer.from_stream]
        sums = InputSums(self.model, gram=True)
        with WatchProducts(self.model, inside, sums.add):
            self.walk.advance(number, self.dense)
        inputs = sums.statistics(self.walk.tokens, self.walk.ranks)
        if self.chooser is not None and consumers:
            choose = partial(self.chooser.choose, self.model, self.graph, self.kept, number, inputs)
            self.kept |= self.walk.ranks.from_first(choose)
            consumers = consumers_of(self.graph, self.kept, number)
        if self.pruned is None:
            return
        producers = ProducerRows(self.model, self.graph, self.kept, number)
        original = Originals([*map(self.model.get_parameter, consumers), *producers.parameters])
        producers.zero()
        self._fit(consumers, inputs)
        self.walk.advance(number, self.pruned)
        original.swap()

    def _fit(self, consumers: Mapping[str, Consumer], inputs: Mapping[str, InputStats]) -> None:
        for name, consumer in consumers.items():
            gram = inputs[name].gram if name in inputs else None
            if gram is not None:
                parameter = self.model.get_parameter(name).data
                parameter.copy_(fitted(parameter, consumer, gram))
            else:
                zero_inputs(self.model, consumer)
