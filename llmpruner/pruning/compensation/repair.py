"""Fitting weights layer by layer, each layer on the outputs of the compensated layers before it.

Hidden states (samples, length, hidden size) in float32 of two models are run through the decoder: h of the dense model
and ĥ of the pruned one. In each layer, every weight matrix W (out × in) that loses inputs is fitted to a target. With x
its inputs from ĥ, removed ones included, and y = W x + b, the target is

    y + (mix / c) · d   with d zero in removed channels of the residual stream,

where the layer adds c times the outputs of such matrices to the residual stream, and d is the difference of the dense
from the pruned model after these matrices: for the last of them in the layer (down projection), the difference of the
hidden states after the layer, with the old W; for others h − ĥ + c · (y_dense − y), with y_dense the outputs in the
dense model. If the layer's output is not such a sum, the target is y. The target of a matrix that reads removed
channels of the residual stream is y_dense. Where a norm inside the layer is computed over the units (query and key
norms over all heads), removed units are silenced where they are produced; then y is the output of a layer that still
produces them.

Matrices that lose no inputs may be fitted too, once the hidden states differ: their targets are the same, or where the
layer's output is not such a sum, y + mix · (y_dense − y).

Shapes do not change: the weights of removed units are set to zero, so that the later cut does not change outputs.

With several processes, each runs its own micro-batches. The first one finds c, the order of the matrices and the units
of a chooser; sums are reduced, and all have the same weights afterwards (`write_all`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import astuple, replace
from functools import partial

import torch

from ...engine.boundaries import States
from ...engine.execution import Execution
from ...engine.products import WatchProducts
from ...engine.statistics import InputSums
from ...engine.walk import Batch, ForwardWalk
from ...structure.kept import removed_layers
from .base import Fit, Repaired, RepairTask
from .consumers import Consumer, consumers_of, intact_readers, stream_writers, zero_inputs
from .fitters import BiasFitter, WeightFitter
from .layer_order import names_in_layer, order_of_use, stream_factor
from .rows import CalibrationRows
from .silencing import Originals, ProducerRows, removed_channels
from .stages import LayerStates, Stage, StageFits
from .token_weights import token_weights


@torch.no_grad()
def repair(
    task: RepairTask,
    fitter: type[WeightFitter | BiasFitter],
    *,
    mix: float | None = 0.0,
    changed: Collection[str] = (),
    weighted: bool = False,
    holds_out_sources: bool = False,
) -> Repaired:
    """Fit every weight matrix of ``task.model`` that reads removed units, in place, and silence these units; removed
    experts are not silenced.

    ``fitter``: fits a matrix to its targets. ``mix``: in the targets, see the module; None: chosen by each fit.
    ``changed``: names of groups whose readers are fitted where they lost no inputs, too. ``weighted``: tokens have the
    weights of `token_weights`. ``holds_out_sources``: sources of the text are held out in turn, not tokens. With
    ``task.chooser``, the units to keep are chosen again in each layer, in the numbers of ``task.kept``.

    Raises `UnsupportedModelError` for a decoder that cannot be run layer by layer, and for a matrix that ``fitter``
    cannot fit.
    """
    assert task.calibration is not None, "a compensation that fits weights reads calibration text"
    execution = task.execution or Execution.of(task.model, task.graph.layers)
    if execution.weights.streamed and task.journal is None:
        raise ValueError(
            "changed weights of a model that is read layer by layer are kept in a journal, and there is none"
        )
    weights = token_weights(task, execution) if weighted else None
    text = task.calibration if holds_out_sources else replace(task.calibration, parts=())
    rows = CalibrationRows(task.model, text, weights)
    return _Repair(task, ForwardWalk.over(execution, task.calibration), fitter, mix, changed, rows).run()


class _Repair:
    """``dense`` and ``pruned``: h and ĥ before the current layer, one tensor per batch; ``pruned`` is None as long as
    no unit was removed, when both are the same."""

    def __init__(
        self,
        task: RepairTask,
        walk: ForwardWalk,
        fitter: type[WeightFitter | BiasFitter],
        mix: float | None,
        changed: Collection[str],
        rows: CalibrationRows,
    ) -> None:
        self.model, self.graph, self.kept, self.chooser = task.model, task.graph, dict(task.kept), task.chooser
        self.walk, self.changed, self.progress = walk, changed, task.progress
        self.weights, self.ranks, self.journal = walk.execution.weights, walk.ranks, task.journal
        self.dense = walk.embedded
        channels = removed_channels(self.graph, self.kept)
        self.stage_fits = StageFits(walk, self.graph, fitter, mix, rows, channels)
        self.pruned: States | None = None
        if len(channels):
            self.pruned = self._copied(self.dense)
        self.fits: list[Fit] = []

    def run(self) -> Repaired:
        removed = removed_layers(self.graph, self.kept)
        layers = range(self.graph.num_layers)
        consumers = [consumers_of(self.graph, self.kept, number) for number in layers]
        intact = [intact_readers(self.graph, self.kept, number, self.changed) for number in layers]
        count = max((number + 1 for number in layers if consumers[number] or intact[number]), default=0)
        done = self._resume()
        for number in self.progress.track(range(count), "Compensating"):
            if number < done:
                continue
            with self.walk.layer(number):
                if number in removed:
                    self._keep_apart()
                    self.walk.advance(number, self.dense)
                elif consumers[number] or (intact[number] and self.pruned is not None):
                    # As long as nothing is removed, the inputs of all weights are those of the dense model.
                    self._layer(number, consumers[number], {} if self.pruned is None else intact[number])
                else:
                    ProducerRows(self.model, self.graph, self.kept, number).zero()
                    self.walk.advance(number, self.dense)
                    if self.pruned is not None:
                        self.walk.advance(number, self.pruned)
            self._record(number)
        return Repaired(self.kept, self.fits)

    def _resume(self) -> int:
        """The number of layers that an interrupted run finished, whose results are used."""
        found = None if self.journal is None else self.journal.resume(self.weights)
        if found is None:
            return 0
        state, states = found
        self.kept = {name: tuple(units) for name, units in state["kept"].items()}
        self.fits = [Fit(*values) for values in state["fits"]]
        if self.chooser is not None:
            self.chooser.scores.update(state["scores"])
        self.dense = self.walk.restored(states["dense"])
        self.pruned = self.walk.restored(states["pruned"]) if "pruned" in states else None
        return int(state["layers"])

    def _record(self, number: int) -> None:
        # A continued run would lack the keys and values that layers have passed on; it fits all layers again.
        if self.journal is not None and not self.walk.passes_on:
            state = {
                "layers": number + 1,
                "kept": {name: list(units) for name, units in self.kept.items()},
                "fits": [astuple(fit) for fit in self.fits],
                "scores": {} if self.chooser is None else self.chooser.scores,
            }
            states = {"dense": self.dense} if self.pruned is None else {"dense": self.dense, "pruned": self.pruned}
            self.journal.layer_done(state, states)

    def _copied(self, states: States) -> States:
        copy = states.beside()
        for hidden in states:
            copy.append(self.stage_fits.silenced(hidden))
        return copy

    def _keep_apart(self) -> States:
        """``pruned``, with hidden states of its own from now on."""
        if self.pruned is None:
            self.pruned = self._copied(self.dense)
        return self.pruned

    def _dense_after(self, number: int, consumers: Mapping[str, Consumer], *, in_place: bool) -> States:
        """h after the layer; ``in_place``: h before it is not needed any more. With a chooser, also chooses the layer's
        units by the inputs of ``consumers``."""
        after = self.dense if in_place else self.dense.beside(continued=True)
        sums = InputSums(self.model, gram=self.chooser is not None and self.chooser.gram)
        with WatchProducts(self.model, consumers if self.chooser else (), sums.add):
            for position, (batch, hidden) in enumerate(self._with(self.dense)):
                found = self.walk.run(number, batch, hidden, after.passed)
                if in_place:
                    after[position] = found
                else:
                    after.append(found)
        if self.chooser is not None and consumers:
            inputs = sums.statistics(self.walk.tokens, self.ranks)
            choose = partial(self.chooser.choose, self.model, self.graph, self.kept, number, inputs)
            self.kept |= self.ranks.from_first(choose)
        return after

    def _with(self, states: States) -> Iterator[tuple[Batch, torch.Tensor]]:
        return zip(self.walk.batches, states, strict=True)

    def _layer(self, number: int, cut: Mapping[str, Consumer], intact: Mapping[str, Consumer]) -> None:
        """Fit the weights of one layer, and move h and ĥ to after it. ``cut``: those that lose inputs; ``intact``:
        others."""
        consumers = {**cut, **intact}
        pruned = self._keep_apart()
        stages, biases = self._stages(number, consumers, pruned)
        needs_dense = any(stage.needs_dense for stage in stages)
        after = self._dense_after(number, cut, in_place=not needs_dense)
        # The chooser may have changed which inputs are kept.
        consumers = {**consumers_of(self.graph, self.kept, number), **intact}
        producers = ProducerRows(self.model, self.graph, self.kept, number)
        changed = [*(self.model.get_parameter(name) for name in consumers), *biases, *producers.parameters]
        original = Originals(changed if needs_dense else [])
        producers.zero()
        states, moved = LayerStates(self.dense, after, pruned), False
        for stage in stages:
            current = replace(stage, consumers={name: consumers[name] for name in stage.consumers})
            fits, moved = self.stage_fits.fit(current, states, producers, original)
            self.fits += fits
        for consumer in consumers.values():
            # Experts that no token was routed to, and weights in products that are not observed, were not fitted.
            zero_inputs(self.model, consumer)
        fitted = {fit.parameter for fit in self.fits}
        self.fits += [Fit(name, None, 0, None) for name in consumers if name not in fitted]
        if not moved:
            self.walk.advance(number, pruned)
        self.dense = after
        if self.journal is not None:
            self.journal.keep(number, self.weights, names_in_layer(self.model, self.graph, number, changed))

    def _stages(
        self, number: int, consumers: Mapping[str, Consumer], pruned: States
    ) -> tuple[list[Stage], list[torch.nn.Parameter]]:
        """The stages of a layer in the order of their use, and the biases of ``consumers``."""
        factor = self.ranks.from_first(lambda: stream_factor(self.walk, self.graph, number, self.dense))
        order = self.ranks.from_first(lambda: order_of_use(self.walk, self.graph, number, pruned, consumers))
        writers = set(stream_writers(self.graph, number))
        stages = [
            Stage(
                number,
                {name: consumers[name] for name in names},
                factor if writers.issuperset(names) else None,
                last=order.last in names,
            )
            for names in order.stages
        ]
        return stages, [self.model.get_parameter(name) for name in order.biases]
