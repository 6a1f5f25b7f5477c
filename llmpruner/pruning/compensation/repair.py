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

The weights of removed units are set to zero, so that the later cut does not change outputs. With several processes,
each runs its own micro-batches; the first finds c and the order of the matrices, and `write_all` sums over all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from itertools import groupby

import torch
from torch.nn import functional

from ...engine.boundaries import States
from ...engine.execution import Execution
from ...engine.products import WatchedProduct, WatchProducts
from ...engine.walk import ForwardWalk, Stop
from ...structure.kept import removed_layers
from .base import RepairTask
from .least_squares import Fit, Fitter, Matrix, write_all
from .readers import ProducerRows, Reader, bias_name, readers_of, removed_channels, stream_writers

_DIRECT = 2e-2
"""Largest relative residual for a layer's output to count as its input plus c times outputs of `stream_writers`."""


@torch.no_grad()
def repair(task: RepairTask, fitter: type[Fitter], *, mix: float = 0.0) -> list[Fit]:
    """Fit the weight matrices of ``task.model`` that read removed units, in place. ``mix``: see the module."""
    assert task.calibration is not None, "a compensation that fits weights reads calibration text"
    execution = task.execution or Execution.of(task.model, task.graph.layers)
    assert execution.journal or not execution.weights.streamed, "changed weights are kept in the journal"
    return _Repair(task, *ForwardWalk.over(execution, task.calibration), fitter, mix).run()


@dataclass(frozen=True)
class _Step:
    """Weights of one layer that read the same inputs and are fitted together. ``factor``: c; None where not all of them
    add to the residual stream. ``last``: the stream writer that is used last is one of them."""

    readers: Mapping[str, Reader]
    factor: float | None
    last: bool

    @property
    def is_simple(self) -> bool:
        """Whether the step is one matrix, used last, whose outputs times c are added to the hidden states."""
        (reader, *others) = self.readers.values()
        inside = not reader.from_stream and not reader.normed
        return self.last and self.factor is not None and not others and inside and len(reader.shape) == 2

    @property
    def needs_dense(self) -> bool:
        """Whether targets need the outputs of the matrices in the dense model."""
        additive = self.factor is not None
        return (additive and not self.last) or any(reader.from_stream for reader in self.readers.values())


_Run = tuple[list[WatchedProduct], torch.Tensor | None]
"""Of a layer: copies of the products with the weights of a step, and its output if it ran to the end."""


class _Repair:
    """``dense`` and ``pruned``: h and ĥ before the current layer; the same object as long as no unit was removed."""

    def __init__(self, task: RepairTask, walk: ForwardWalk, embedded: States, fitter: type[Fitter], mix: float) -> None:
        self.model, self.graph, self.kept = task.model, task.graph, task.kept
        self.walk, self.fitter, self.mix, execution = walk, fitter, mix, walk.execution
        self.weights, self.ranks, self.journal = execution.weights, execution.ranks, execution.journal
        self.removed_channels = removed_channels(self.graph, self.kept)
        self.dense = self.pruned = embedded
        if len(self.removed_channels):
            self._keep_apart()
        self.fits: list[Fit] = []

    def run(self) -> list[Fit]:
        removed = removed_layers(self.graph, self.kept)
        layers = range(self.graph.num_layers)
        readers = [readers_of(self.graph, self.kept, number) for number in layers]
        count = max((number + 1 for number in layers if readers[number]), default=0)
        done = self._resume()
        for number in self.walk.execution.progress.track(range(count), "Compensating"):
            if number < done:
                continue
            with self.weights.layer(number):
                if number in removed:
                    self._keep_apart()
                    self.walk.advance(number, self.dense)
                elif readers[number]:
                    self._fit_layer(number, readers[number])
                else:
                    self.walk.advance(number, self.dense)
                    if self.pruned is not self.dense:
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
        embedded, self.dense = self.dense, self.dense.loaded(states["dense"])
        self.pruned = embedded.loaded(states["pruned"]) if "pruned" in states else self.dense
        return int(state["layers"])

    def _record(self, number: int) -> None:
        # A continued run would lack the keys and values that layers have passed on; it fits all layers again.
        if self.journal is not None and not self.walk.form.passes_on:
            state = {"layers": number + 1, "fits": [astuple(fit) for fit in self.fits]}
            apart = {} if self.pruned is self.dense else {"pruned": self.pruned}
            self.journal.layer_done(state, {"dense": self.dense, **apart})

    def _keep_apart(self) -> None:
        """Give ``pruned`` hidden states of its own, zero in removed channels of the residual stream."""
        if self.pruned is self.dense:
            self.pruned = self.dense.empty(apart=True)
            for hidden in self.dense:
                self.pruned.append(hidden.index_fill(-1, self.removed_channels.to(hidden.device), 0.0))

    def _fit_layer(self, number: int, readers: Mapping[str, Reader]) -> None:
        """Fit the weights of layer ``number``, and move h and ĥ to after it. Its steps need: ``after``, h after it;
        ``biases``, weight → name of its bias; ``producers``, the silenced rows; ``original``, weights with copies."""
        self._keep_apart()
        steps, self.biases = self.ranks.from_first(lambda: self._steps(number, readers))
        needs_dense = any(step.needs_dense for step in steps)
        if needs_dense:
            self.after = self.dense.empty()
            for position in range(len(self.walk.calls)):
                self.after.append(self.walk.run(number, position, self.dense))
        else:
            self.after = self.dense
            self.walk.advance(number, self.after)
        self.number, self.producers = number, ProducerRows(self.model, self.graph, self.kept, number)
        changed = dict.fromkeys([*readers, *self.biases.values(), *self.producers.names])
        parameters = [self.model.get_parameter(name) for name in changed] if needs_dense else []
        self.original = [(p, p.detach().clone()) for p in parameters]
        self.producers.zero()
        moved = False
        for step in steps:
            moved = self._fit(step)
        for reader in readers.values():
            # Experts that no token was routed to, and weights in products that are not observed, were not fitted.
            parameter = self.model.get_parameter(reader.parameter).data
            gone = torch.ones(parameter.shape[reader.axis], dtype=torch.bool)
            gone[reader.kept] = False
            parameter.index_fill_(reader.axis, gone.nonzero().flatten().to(parameter.device), 0.0)
        fitted = {fit.parameter for fit in self.fits}
        self.fits += [Fit(name, None, 0, None) for name in readers if name not in fitted]
        if not moved:
            self.walk.advance(number, self.pruned)
        self.dense = self.after
        del self.producers, self.original  # they keep weights of this layer in memory
        if self.journal is not None:
            self.journal.keep(number, self.weights, changed)

    def _steps(self, number: int, readers: Mapping[str, Reader]) -> tuple[list[_Step], dict[str, str]]:
        """The steps of layer ``number`` in order, and weight → bias. c is a least-squares solution, see `_DIRECT`."""
        uses: dict[str, WatchedProduct] = {}
        outputs: list[torch.Tensor] = []

        # Inputs are compared by address; all are kept until the end, so that no address is used twice. Their values,
        # which may have changed by then, are not read.
        def seen(use: WatchedProduct) -> None:
            uses.setdefault(use.parameter, use)
            if use.parameter in writers:
                # The layer may add to them in place afterwards.
                outputs.append(use.outputs.to(torch.float32, copy=True))

        factor: float | None = None
        writers = stream_writers(self.graph, number)
        with WatchProducts(self.model, [*readers, *writers], seen):
            change = (self.walk.run(number, 0, self.dense) - self.dense[0]).flatten(0, -2)
        if outputs and all(part.shape == change.shape for part in outputs):
            total = torch.stack(outputs).sum(0)
            solution = float((change * total).sum() / total.square().sum().clamp_min(1e-30))
            if float((change - solution * total).norm()) < _DIRECT * float(change.norm()):
                factor = solution
        last = next((name for name in reversed(uses) if name in writers), None)
        read = [use for name, use in uses.items() if name in readers]
        together = [[use.parameter for use in same] for _, same in groupby(read, key=lambda use: use.inputs.data_ptr())]
        steps = [
            _Step({n: readers[n] for n in names}, factor if set(writers).issuperset(names) else None, last in names)
            for names in together
        ]
        biases = {}
        for use in read:
            if use.bias is not None and (name := bias_name(self.model, self.graph, number, use.bias)):
                biases[use.parameter] = name
        return steps, biases

    def _fit(self, step: _Step) -> bool:
        """Fit the weights of one step. Returns whether ĥ was moved to after the layer, as it is by a simple step."""
        fitters: dict[Matrix, Fitter] = {}
        simple, inputs = step.is_simple, self.pruned.empty()
        for position in range(len(self.walk.calls)):
            (uses, output), (uncut_uses, uncut_output), dense = self._observe(step, position)
            for use, uncut_use in zip(uses, uncut_uses, strict=True):
                reader, key = step.readers[use.parameter], (use.parameter, use.slot)
                if reader.from_stream and use.slot is not None:
                    # Other tokens are routed to the expert in the dense model, so rows do not correspond.
                    continue
                target = self._target(step, position, uncut_output, uncut_use, dense.get(key))
                if key not in fitters:
                    fitters[key] = self._fitter(step, *key)
                fitters[key].add(use, target)
            simple = simple and len(uses) == 1
            if simple:
                assert output is not None and step.factor is not None, "simple steps are last"
                (use,) = uses
                self.pruned[position] = output - step.factor * use.outputs.float().view_as(output)
                inputs.append(use.inputs.index_select(1, step.readers[use.parameter].kept.to(use.inputs.device)))
        # A process may have no tokens for an expert.
        every = self.ranks.merged(dict.fromkeys(fitters))
        fitters = {key: fitters.get(key) or self._fitter(step, *key) for key in every}
        self.fits += write_all(fitters, self.ranks)
        self.producers.zero()
        if simple:
            (fitter,) = fitters.values()
            self._add_outputs(step, fitter, inputs)
        return simple

    def _add_outputs(self, step: _Step, fitter: Fitter, inputs: States) -> None:
        """Add c times the outputs of the fitted matrix to ĥ. ``inputs``: its kept ones, whose dtype the product has."""
        assert step.factor is not None, "simple steps are additive"
        weight, bias = fitter.matrix.index_select(1, fitter.kept), fitter.bias
        for position, part in enumerate(inputs):
            rest, dtype = self.pruned[position], part.dtype
            outputs = functional.linear(part, weight.to(dtype), None if bias is None else bias.to(dtype)).float()
            self.pruned[position] = rest + step.factor * outputs.view_as(rest)

    def _observe(self, step: _Step, position: int) -> tuple[_Run, _Run, dict[Matrix, torch.Tensor]]:
        """Run the layer on ĥ, with removed units silenced, and uncut; and the dense layer where targets need it."""
        uncut: _Run | None = None
        if any(reader.normed for reader in step.readers.values()):
            # Removed units are silenced where they are produced, so that targets need another run. It comes first, as
            # later layers read the keys and values that the last run passes on.
            self.producers.restore()
            uncut = self._run(step, position, self.pruned, whole=step.last)
            self.producers.zero()
        pruned = self._run(step, position, self.pruned, whole=step.last)
        if not step.needs_dense:
            return pruned, uncut or pruned, {}
        self._swap_weights()
        dense, _ = self._run(step, position, self.dense, whole=False)
        self._swap_weights()
        return pruned, uncut or pruned, {(use.parameter, use.slot): use.outputs.float() for use in dense}

    def _run(self, step: _Step, position: int, states: States, *, whole: bool) -> _Run:
        """Run the layer; without ``whole``, only until all weights of the step were used."""
        uses, waiting = list[WatchedProduct](), set(step.readers)
        output: torch.Tensor | None = None

        def seen(use: WatchedProduct) -> None:
            uses.append(use.copied())
            waiting.discard(use.parameter)
            if not whole and not waiting and use.slot is None:
                raise Stop

        with contextlib.suppress(Stop), WatchProducts(self.model, step.readers, seen):
            output = self.walk.run(self.number, position, states)
        return uses, output

    def _target(
        self, step: _Step, position: int, uncut: torch.Tensor | None, use: WatchedProduct, dense: torch.Tensor | None
    ) -> torch.Tensor:
        """The target (tokens, out), float32, see the module. ``use``: the product that y is of; ``dense``: y_dense."""
        outputs = use.outputs.float()
        if step.readers[use.parameter].from_stream:
            assert dense is not None
            return dense
        if step.factor is None:
            return outputs
        if step.last:
            assert uncut is not None
            difference = self.after[position] - uncut
        else:
            assert dense is not None
            before = self.dense[position]
            difference = before - self.pruned[position] + step.factor * (dense - outputs).view_as(before)
        # Differences in removed channels of the residual stream cannot be compensated.
        difference = difference.index_fill(-1, self.removed_channels.to(difference.device), 0.0)
        return outputs + self.mix / step.factor * difference.flatten(0, -2)

    def _fitter(self, step: _Step, name: str, slot: int | None) -> Fitter:
        reader, matrix = step.readers[name], self.model.get_parameter(name).data
        transposed = reader.axis < matrix.dim() - 1
        bias = self.model.get_parameter(self.biases[name]).data if name in self.biases else None
        if slot is not None:
            matrix, bias = matrix[slot], None if bias is None else bias[slot]
        return self.fitter(reader, matrix.T if transposed else matrix, bias)

    def _swap_weights(self) -> None:
        """Give the changed weights of the layer their values of the dense model, or back."""
        for parameter, copy in self.original:
            parameter.data, copy.data = copy.data, parameter.data
