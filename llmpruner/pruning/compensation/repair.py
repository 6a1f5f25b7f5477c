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
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import groupby
from typing import Any

import torch
from torch.nn import functional

from ...engine.boundaries import States
from ...engine.execution import Execution
from ...engine.journal import Journal
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
    execution = task.execution or Execution.of(task.model, task.graph.layers)
    assert execution.journal or not execution.weights.streamed, "changed weights are kept in the journal"
    (fits,) = _DenseRun([task], execution, execution.journal, fitter, mix, restores=False).run()
    return fits


@torch.no_grad()
def repair_each(tasks: Sequence[RepairTask], fitter: type[Fitter], *, mix: float = 0.0) -> None:
    """Do for each of ``tasks``, on one run of the dense model, what `repair` would, and keep it in its journal, from
    which `repair` takes it. The tasks differ in what is kept and in the journal alone; weights end as they were."""
    execution = tasks[0].execution
    assert execution is not None, "with journals"
    dense = _DenseRun(tasks, execution, execution.shared, fitter, mix, restores=True)
    for task, fits in zip(tasks, dense.run(), strict=True):
        if task.execution and task.execution.journal:
            task.execution.journal.all_done(_state(len(execution.layers), [fits]))


def _state(layers: int, fits: Sequence[Sequence[Fit]]) -> dict[str, Any]:
    """What a journal keeps: how many layers are done, and the fits of each task."""
    return {"layers": layers, "fits": [[astuple(fit) for fit in of_task] for of_task in fits]}


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


class _DenseRun:
    """One run of the dense model, with a `_Repair` beside it for each of ``tasks``. ``dense``: h before the current
    layer. ``journal``: keeps the hidden states."""

    def __init__(
        self, tasks: Sequence[RepairTask], execution: Execution, journal: Journal | None, fitter: type[Fitter],
        mix: float, *, restores: bool,
    ) -> None:  # fmt: skip
        text = tasks[0].calibration
        assert text is not None, "a compensation that fits weights reads calibration text"
        self.walk, self.dense = ForwardWalk.over(execution, text)
        self.journal = journal
        self.repairs = [_Repair(task, self.walk, self.dense, fitter, mix, restores=restores) for task in tasks]

    def run(self) -> list[list[Fit]]:
        execution = self.walk.execution
        layers = range(len(self.walk.layers))
        count = max((n + 1 for n in layers for each in self.repairs if each.readers[n]), default=0)
        done = self._resume()
        for number in execution.progress.track(range(count), "Compensating"):
            if number < done:
                continue
            with execution.weights.layer(number):
                for each in self.repairs:
                    each.begin(number, self.dense)
                before, after = self.dense, self.dense
                if any(each.needs_dense for each in self.repairs):
                    after = before.empty()
                    for position in range(len(self.walk.calls)):
                        after.append(self.walk.run(number, position, before))
                else:
                    self.walk.advance(number, after)
                for each in self.repairs:
                    each.end(number, before, after)
                self.dense = after
            self._record(number)
        return [each.fits for each in self.repairs]

    def _resume(self) -> int:
        """The number of layers that an interrupted run finished, whose results are used."""
        earlier = None if self.journal is None else self.journal.resume(self.walk.execution.weights)
        if earlier is None:
            return 0
        state, files = earlier
        embedded = self.dense
        for number, (each, fits) in enumerate(zip(self.repairs, state["fits"], strict=True)):
            each.fits = [Fit(*values) for values in fits]
            each.pruned = embedded.loaded(files[f"pruned-{number}"]) if f"pruned-{number}" in files else None
        if "dense" in files:
            self.dense = embedded.loaded(files["dense"])
        return int(state["layers"])

    def _record(self, number: int) -> None:
        # A continued run would lack the keys and values that layers have passed on; it fits all layers again.
        if self.journal is not None and not self.walk.form.passes_on:
            pruned = {f"pruned-{n}": each.pruned for n, each in enumerate(self.repairs) if each.pruned is not None}
            state = _state(number + 1, [each.fits for each in self.repairs])
            self.journal.layer_done(state, {"dense": self.dense, **pruned})


class _Repair:
    """The fits of one task. ``pruned``: ĥ before the current layer; None as long as no unit was removed, when it is h.
    ``restores``: whether weights get back the values of the dense model after each layer."""

    def __init__(
        self, task: RepairTask, walk: ForwardWalk, embedded: States, fitter: type[Fitter], mix: float, *, restores: bool
    ) -> None:
        self.model, self.graph, self.kept = task.model, task.graph, task.kept
        self.walk, self.fitter, self.mix, self.restores = walk, fitter, mix, restores
        self.weights, self.ranks = walk.execution.weights, walk.execution.ranks
        self.journal = None if task.execution is None else task.execution.journal
        self.removed_channels = removed_channels(self.graph, self.kept)
        self.removed_layers = removed_layers(self.graph, self.kept)
        self.readers = [readers_of(self.graph, self.kept, number) for number in range(self.graph.num_layers)]
        self.pruned: States | None = None
        if len(self.removed_channels):
            self._keep_apart(embedded)
        self.steps: list[_Step] = []
        self.fits: list[Fit] = []

    @property
    def needs_dense(self) -> bool:
        """Whether `end` reads h before the layer."""
        return any(step.needs_dense for step in self.steps)

    def _keep_apart(self, dense: States) -> None:
        """Give ``pruned`` hidden states of its own, zero in removed channels of the residual stream."""
        if self.pruned is None:
            self.pruned = dense.empty(apart=True)
            for hidden in dense:
                self.pruned.append(hidden.index_fill(-1, self.removed_channels.to(hidden.device), 0.0))

    def begin(self, number: int, dense: States) -> None:
        """Before h moves to after layer ``number``: find the steps of the layer, if it loses inputs."""
        self.steps, self.biases = [], dict[str, str]()
        readers = {} if number in self.removed_layers else self.readers[number]
        if readers or number in self.removed_layers:
            self._keep_apart(dense)
        if readers:
            self.steps, self.biases = self.ranks.from_first(lambda: self._steps(number, readers, dense))

    def end(self, number: int, dense: States, after: States) -> None:
        """Move ĥ to after layer ``number``. ``dense``, ``after``: h before the layer, if it is read, and after it."""
        if self.pruned is None or number in self.removed_layers:
            return
        if not self.readers[number]:
            self.walk.advance(number, self.pruned)
            return
        self.dense, self.after = dense, after
        self._fit_layer(number, self.readers[number], self.pruned)
        del self.dense, self.after

    def _fit_layer(self, number: int, readers: Mapping[str, Reader], pruned: States) -> None:
        """Fit the weights of layer ``number``, and move ĥ to after it. Its steps need: ``producers``, the silenced
        rows; ``original``, weights with copies."""
        self.number, self.producers = number, ProducerRows(self.model, self.graph, self.kept, number)
        changed = dict.fromkeys([*readers, *self.biases.values(), *self.producers.names])
        copied = changed if self.needs_dense or self.restores else ()
        self.original = [(p, p.detach().clone()) for p in map(self.model.get_parameter, copied)]
        self.producers.zero()
        moved = False
        for step in self.steps:
            moved = self._fit(step, pruned)
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
        if self.journal is not None:
            self.journal.keep(number, self.weights, changed, used=not self.restores)
        if self.restores:
            self._swap_weights()
        del self.producers, self.original  # they keep weights of this layer in memory

    def _steps(self, number: int, readers: Mapping[str, Reader], dense: States) -> tuple[list[_Step], dict[str, str]]:
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
            change = (self.walk.run(number, 0, dense) - dense[0]).flatten(0, -2)
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

    def _fit(self, step: _Step, pruned: States) -> bool:
        """Fit the weights of one step. Returns whether ĥ was moved to after the layer, as it is by a simple step."""
        fitters: dict[Matrix, Fitter] = {}
        simple, inputs = step.is_simple, pruned.empty()
        for position in range(len(self.walk.calls)):
            (uses, output), (uncut_uses, uncut_output), dense = self._observe(step, position, pruned)
            for use, uncut_use in zip(uses, uncut_uses, strict=True):
                reader, key = step.readers[use.parameter], (use.parameter, use.slot)
                if reader.from_stream and use.slot is not None:
                    # Other tokens are routed to the expert in the dense model, so rows do not correspond.
                    continue
                target = self._target(step, position, pruned, uncut_output, uncut_use, dense.get(key))
                if key not in fitters:
                    fitters[key] = self._fitter(step, *key)
                fitters[key].add(use, target)
            simple = simple and len(uses) == 1
            if simple:
                assert output is not None and step.factor is not None, "simple steps are last"
                (use,) = uses
                pruned[position] = output - step.factor * use.outputs.float().view_as(output)
                inputs.append(use.inputs.index_select(1, step.readers[use.parameter].kept.to(use.inputs.device)))
        # A process may have no tokens for an expert.
        every = self.ranks.merged(dict.fromkeys(fitters))
        fitters = {key: fitters.get(key) or self._fitter(step, *key) for key in every}
        self.fits += write_all(fitters, self.ranks)
        self.producers.zero()
        if simple:
            (fitter,) = fitters.values()
            self._add_outputs(step, fitter, pruned, inputs)
        return simple

    def _add_outputs(self, step: _Step, fitter: Fitter, pruned: States, inputs: States) -> None:
        """Add c times the outputs of the fitted matrix to ĥ. ``inputs``: its kept ones, whose dtype the product has."""
        assert step.factor is not None, "simple steps are additive"
        weight, bias = fitter.matrix.index_select(1, fitter.kept), fitter.bias
        for position, part in enumerate(inputs):
            rest, dtype = pruned[position], part.dtype
            outputs = functional.linear(part, weight.to(dtype), None if bias is None else bias.to(dtype)).float()
            pruned[position] = rest + step.factor * outputs.view_as(rest)

    def _observe(self, step: _Step, position: int, states: States) -> tuple[_Run, _Run, dict[Matrix, torch.Tensor]]:
        """Run the layer on ĥ, with removed units silenced, and uncut; and the dense layer where targets need it."""
        uncut: _Run | None = None
        if any(reader.normed for reader in step.readers.values()):
            # Removed units are silenced where they are produced, so that targets need another run. It comes first, as
            # later layers read the keys and values that the last run passes on.
            self.producers.restore()
            uncut = self._run(step, position, states, whole=step.last)
            self.producers.zero()
        pruned = self._run(step, position, states, whole=step.last)
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
        self, step: _Step, position: int, pruned: States, uncut: torch.Tensor | None, use: WatchedProduct,
        dense: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
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
            difference = before - pruned[position] + step.factor * (dense - outputs).view_as(before)
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
