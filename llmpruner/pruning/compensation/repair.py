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

Shapes do not change: the weights of removed units are set to zero, so that the later cut does not change outputs.

With several processes, each runs its own micro-batches. The first one finds c and the order of the matrices; sums are
reduced, and all have the same weights afterwards (`write_all`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from functools import partial

import torch

from ...engine.boundaries import States
from ...engine.execution import Execution
from ...engine.walk import ForwardWalk
from ...structure.kept import removed_layers
from .base import Fit, RepairTask
from .layer_fit import LayerFit, fit_steps
from .least_squares import Fitter
from .readers import ProducerRows, Reader, names_in_layer, readers_of, removed_channels


@torch.no_grad()
def repair(task: RepairTask, fitter: type[Fitter], *, mix: float = 0.0) -> list[Fit]:
    """Fit every weight matrix of ``task.model`` that reads removed units, in place, and silence these units; removed
    experts are not silenced.

    ``fitter``: fits a matrix to its targets. ``mix``: in the targets, see the module.

    Raises `UnsupportedModelError` for a decoder that cannot be run layer by layer, and for a matrix that ``fitter``
    cannot fit.
    """
    assert task.calibration is not None, "a compensation that fits weights reads calibration text"
    execution = task.execution or Execution.of(task.model, task.graph.layers)
    assert execution.journal or not execution.weights.streamed, "changed weights are kept in the journal"
    return _Repair(task, *ForwardWalk.over(execution, task.calibration), fitter, mix).run()


class _Repair:
    """``dense`` and ``pruned``: h and ĥ before the current layer, one tensor per batch; ``pruned`` is None as long as
    no unit was removed, when both are the same."""

    def __init__(self, task: RepairTask, walk: ForwardWalk, embedded: States, fitter: type[Fitter], mix: float) -> None:
        self.model, self.graph, self.kept = task.model, task.graph, task.kept
        self.walk, self.fitter, self.mix, self.execution = walk, fitter, mix, walk.execution
        self.weights, self.ranks, self.journal = self.execution.weights, self.execution.ranks, self.execution.journal
        self.channels = removed_channels(self.graph, self.kept)
        self.dense = embedded
        self.pruned: States | None = None
        if len(self.channels):
            self._keep_apart()
        self.fits: list[Fit] = []

    def run(self) -> list[Fit]:
        removed = removed_layers(self.graph, self.kept)
        layers = range(self.graph.num_layers)
        readers = [readers_of(self.graph, self.kept, number) for number in layers]
        count = max((number + 1 for number in layers if readers[number]), default=0)
        done = self._resume()
        for number in self.execution.progress.track(range(count), "Compensating"):
            if number < done:
                continue
            with self.weights.layer(number):
                if number in removed:
                    self._keep_apart()
                    self.walk.advance(number, self.dense)
                elif readers[number]:
                    self._fit_layer(number, readers[number])
                else:
                    ProducerRows(self.model, self.graph, self.kept, number).zero()
                    self.walk.advance(number, self.dense)
                    if self.pruned is not None:
                        self.walk.advance(number, self.pruned)
            self._record(number)
        return self.fits

    def _resume(self) -> int:
        """The number of layers that an interrupted run finished, whose results are used."""
        earlier = None if self.journal is None else self.journal.resume(self.weights)
        if earlier is None:
            return 0
        state, states = earlier
        self.fits = [Fit(*values) for values in state["fits"]]
        self.pruned = self.dense.loaded(states["pruned"]) if "pruned" in states else None
        self.dense = self.dense.loaded(states["dense"])
        return int(state["layers"])

    def _record(self, number: int) -> None:
        # A continued run would lack the keys and values that layers have passed on; it fits all layers again.
        if self.journal is not None and not self.walk.passes_on:
            state = {"layers": number + 1, "fits": [astuple(fit) for fit in self.fits]}
            states = {"dense": self.dense} if self.pruned is None else {"dense": self.dense, "pruned": self.pruned}
            self.journal.layer_done(state, states)

    def _keep_apart(self) -> States:
        """``pruned``, with hidden states of its own from now on, zero in removed channels of the residual stream."""
        if self.pruned is None:
            self.pruned = self.dense.empty()
            for hidden in self.dense:
                self.pruned.append(hidden.index_fill(-1, self.channels.to(hidden.device), 0.0))
        return self.pruned

    def _fit_layer(self, number: int, readers: Mapping[str, Reader]) -> None:
        """Fit the weights of one layer, and move h and ĥ to after it."""
        pruned = self._keep_apart()
        uses = partial(fit_steps, self.walk, self.graph, number, self.dense, readers)
        steps, biases = self.ranks.from_first(uses)
        needs_dense = any(step.needs_dense for step in steps)
        if needs_dense:
            after = self.dense.empty(continued=True)
            for position in range(len(self.walk.calls)):
                after.append(self.walk.run(number, position, self.dense))
        else:
            after = self.dense
            self.walk.advance(number, after)
        producers = ProducerRows(self.model, self.graph, self.kept, number)
        changed = [*map(self.model.get_parameter, (*readers, *biases)), *producers.parameters]
        original = [(p, p.detach().clone()) for p in {id(p): p for p in changed}.values()] if needs_dense else []
        producers.zero()
        layer = LayerFit(
            self.walk, self.graph, number, self.fitter, self.mix, self.channels,
            self.dense, after, pruned, producers, original,
        )  # fmt: skip
        moved = False
        for step in steps:
            fits, moved = layer.fit(step)
            self.fits += fits
        for reader in readers.values():
            # Experts that no token was routed to, and weights in products that are not observed, were not fitted.
            parameter = self.model.get_parameter(reader.parameter).data
            gone = torch.ones(parameter.shape[reader.axis], dtype=torch.bool)
            gone[reader.kept] = False
            parameter.index_fill_(reader.axis, gone.nonzero().flatten().to(parameter.device), 0.0)
        fitted = {fit.parameter for fit in self.fits}
        self.fits += [Fit(name, None, 0, None) for name in readers if name not in fitted]
        if not moved:
            self.walk.advance(number, pruned)
        self.dense = after
        if self.journal is not None:
            self.journal.keep(number, self.weights, names_in_layer(self.model, self.graph, number, changed))
