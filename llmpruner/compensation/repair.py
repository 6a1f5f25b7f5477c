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

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from itertools import groupby

import torch
from torch.nn import functional

from ..engine.boundaries import States
from ..engine.calls import Batch, Stop
from ..engine.executor import Executor
from ..engine.inputs import InputSums
from ..engine.walk import ForwardWalk
from ..engine.watch import WatchedProduct, WatchProducts
from ..structure.kept import removed_layers
from .base import Fit, Repaired, RepairTask
from .consumers import Consumer, consumers_of, intact_readers, matrix_of, stream_writers, zero_inputs
from .fitters import BiasFitter, Fitter, Matrix, WeightFitter, write_all
from .rows import CalibrationRows, Rows
from .silencing import Originals, ProducerRows, removed_channels
from .token_weights import token_weights

_DIRECT = 2e-2
"""Largest relative residual for a layer's output to count as its input plus a multiple of its `stream_writers`'
outputs."""


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
    executor = task.executor or Executor.of(task.model, task.graph.layers)
    if executor.weights.streamed and task.journal is None:
        raise ValueError(
            "changed weights of a model that is read layer by layer are kept in a journal, and there is none"
        )
    weights = token_weights(task, executor) if weighted else None
    text = task.calibration if holds_out_sources else replace(task.calibration, parts=())
    rows = CalibrationRows(task.model, text, weights)
    return _Repair(task, ForwardWalk.over(executor, task.calibration), fitter, mix, changed, rows).run()


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
        self.walk, self.fitter, self.mix, self.progress = walk, fitter, mix, task.progress
        self.changed, self.rows = changed, rows
        self.weights, self.ranks, self.journal = walk.executor.weights, walk.ranks, task.journal
        self.dense = walk.embedded
        self.removed_channels = removed_channels(self.graph, self.kept)
        self.pruned: States | None = None
        if len(self.removed_channels):
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
            copy.append(self._without_removed_channels(hidden))
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
        scale = self.ranks.from_first(lambda: self._scale(number))
        bias_names, order, last = self.ranks.from_first(lambda: self._order(number, consumers))
        biases = [self.model.get_parameter(name) for name in bias_names]
        writers = set(stream_writers(self.graph, number))
        plans = [
            _Stage(
                number,
                {name: consumers[name] for name in names},
                scale if writers.issuperset(names) else None,
                last=last in names,
            )
            for names in order
        ]
        needs_dense = any(stage.needs_dense for stage in plans)
        after = self._dense_after(number, cut, in_place=not needs_dense)
        # The chooser may have changed which inputs are kept.
        consumers = {**consumers_of(self.graph, self.kept, number), **intact}
        producers = ProducerRows(self.model, self.graph, self.kept, number)
        changed = [*(self.model.get_parameter(name) for name in consumers), *biases, *producers.parameters]
        original = Originals(changed if needs_dense else [])
        producers.zero()
        moved = False
        for stage in plans:
            current = replace(stage, consumers={name: consumers[name] for name in stage.consumers})
            moved = self._fit(current, after, producers, original)
        for consumer in consumers.values():
            # Experts that no token was routed to, and weights in products that are not observed, were not fitted.
            zero_inputs(self.model, consumer)
        fitted = {fit.parameter for fit in self.fits}
        self.fits += [Fit(name, None, 0, None) for name in consumers if name not in fitted]
        if not moved:
            self.walk.advance(number, pruned)
        self.dense = after
        if self.journal is not None:
            self.journal.keep(number, self.weights, self._names(number, changed))

    def _names(self, number: int, tensors: Sequence[torch.Tensor]) -> list[str]:
        """The names of those of the ``tensors`` that are parameters of layer ``number``."""
        changed = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        prefix = f"{self.graph.layers}.{number}."
        layer = self.model.get_submodule(prefix[:-1])
        return [prefix + n for n, p in layer.named_parameters() if p.untyped_storage().data_ptr() in changed]

    def _scale(self, number: int) -> float | None:
        """c, where the layer's output is its input plus c times the outputs of its writers; None where it is not.

        c is the least-squares solution on the first batch of h, taken if its relative residual is below `_DIRECT`.
        """
        outputs: list[torch.Tensor] = []

        def seen(use: WatchedProduct) -> None:
            # The layer may add to them in place afterwards.
            outputs.append(use.outputs.to(torch.float32, copy=True))

        batch, hidden = self.walk.batches[0], self.dense[0]
        with WatchProducts(self.model, stream_writers(self.graph, number), seen):
            change = (self.walk.run(number, batch, hidden, self.dense.passed, tried=True) - hidden).flatten(0, -2)
        if not outputs or any(part.shape != change.shape for part in outputs):
            return None
        total = torch.stack(outputs).sum(0)
        scale = float((change * total).sum() / total.square().sum().clamp_min(1e-30))
        return scale if float((change - scale * total).norm()) < _DIRECT * float(change.norm()) else None

    def _order(self, number: int, consumers: Mapping[str, Consumer]) -> tuple[list[str], list[list[str]], str | None]:
        """The names of the biases of the consumers; of the consumers in order of use, where those that read the same
        inputs are fitted together, and are in one list; and of the last of the `stream_writers` that is used."""
        uses: dict[str, WatchedProduct] = {}

        # Inputs are compared by address; all are kept until the end, so that no address is used twice. Their values,
        # which may have changed by then, are not read.
        def seen(use: WatchedProduct) -> None:
            uses.setdefault(use.parameter, use)

        assert self.pruned is not None
        writers = stream_writers(self.graph, number)
        with WatchProducts(self.model, dict.fromkeys([*consumers, *writers]), seen):
            self.walk.run(number, self.walk.batches[0], self.pruned[0], self.pruned.passed, tried=True)
        last = next((name for name in reversed(uses) if name in writers), None)
        uses = {name: use for name, use in uses.items() if name in consumers}
        together = groupby(uses.values(), key=lambda use: use.inputs.data_ptr())
        stages = [[use.parameter for use in same] for _, same in together]
        return self._names(number, [use.bias for use in uses.values() if use.bias is not None]), stages, last

    def _without_removed_channels(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.index_fill(-1, self.removed_channels.to(hidden.device), 0.0)

    def _fit(self, stage: _Stage, after: States, producers: ProducerRows, original: Originals) -> bool:
        """Fit the weights of one stage. ``after``: h after the layer. Returns whether ĥ was moved to after the layer,
        which needs no further run of it where the stage `_Stage.is_simple`."""
        assert self.pruned is not None
        fitters: dict[Matrix, Fitter] = {}
        inputs = self.pruned.beside()
        simple = stage.is_simple
        # The weights of removed inputs will be zero.
        first = next(iter(stage.consumers.values()))
        kept = first.kept.to(self.model.get_parameter(first.parameter).device)
        for position, (batch, hidden) in enumerate(self._with(self.pruned)):
            pruned = uncut = self._watch(stage, batch, hidden, self.pruned, whole=stage.last)
            if stage.is_normed:
                with producers.restored():
                    uncut = self._watch(stage, batch, hidden, self.pruned, whole=stage.last, tried=True)
            dense_outputs: dict[Matrix, torch.Tensor] = {}
            if stage.needs_dense:
                with original.swapped_in():
                    dense = self._watch(stage, batch, self.dense[position], self.dense, whole=False, tried=True)
                dense_outputs = {(use.parameter, use.slot): use.outputs.float() for use in dense.uses}
            of_layer = after[position] if stage.last else None
            for use, own, rows in zip(pruned.uses, uncut.uses, pruned.rows, strict=True):
                consumer = stage.consumers[use.parameter]
                if consumer.from_stream and use.slot is not None:
                    # Other tokens are routed to the expert in the dense model, so rows do not correspond.
                    continue
                key = use.parameter, use.slot
                target, toward = self._target(
                    stage, consumer, own.outputs.float(), dense_outputs.get(key), position, of_layer, uncut.output
                )
                if key not in fitters:
                    fitters[key] = self._fitter(stage, key, use.bias)
                fitters[key].add(use, target, rows, toward)
            simple = simple and pruned.output is not None and len(pruned.uses) == 1
            if simple and pruned.output is not None:
                (use,) = pruned.uses
                # ĥ after the layer, without what the weight adds to it.
                self.pruned[position] = pruned.output - stage.factor * use.outputs.float().view_as(pruned.output)
                inputs.append(use.inputs.index_select(1, kept))
        fitters = self._of_all(stage, fitters)
        self.fits += write_all(fitters, self.model, self.ranks)
        producers.zero()
        if not simple:
            return False
        (fitter,) = fitters.values()
        (name,) = stage.consumers
        weight = matrix_of(self.model, stage.consumers[name], None).index_select(1, kept)
        for position, values in enumerate(inputs):
            rest = self.pruned[position]
            self.pruned[position] = rest + stage.factor * _outputs(weight, fitter.bias, values).view_as(rest)
        return True

    def _fitter(self, stage: _Stage, key: Matrix, bias: torch.Tensor | None) -> Fitter:
        consumer = stage.consumers[key[0]]
        mixed = self.mix is None and stage.differs(consumer)
        return self.fitter(consumer, matrix_of(self.model, consumer, key[1]), bias, mixed=mixed)

    def _of_all(self, stage: _Stage, fitters: Mapping[Matrix, Fitter]) -> dict[Matrix, Fitter]:
        """Fitters of the matrices that any process has one for: a process may have no tokens for an expert."""

        def bias_of(fitter: Fitter) -> str | None:
            return None if fitter.bias is None else next(iter(self._names(stage.number, [fitter.bias])), None)

        found: dict[Matrix, Fitter] = {}
        for key, name in self.ranks.merged({key: bias_of(fitter) for key, fitter in fitters.items()}).items():
            if key not in fitters:
                bias = None if name is None else self.model.get_parameter(name).data
                # The bias of one expert is a row of that of all.
                row = bias if bias is None or bias.dim() == 1 or key[1] is None else bias[key[1]]
                found[key] = self._fitter(stage, key, row)
            else:
                found[key] = fitters[key]
        return found

    def _target(
        self,
        stage: _Stage,
        consumer: Consumer,
        own: torch.Tensor,
        dense: torch.Tensor | None,
        position: int,
        after: torch.Tensor | None,
        output: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The target (tokens, out), see the module, and d / c, of which the fit chooses a share, None where it chooses
        none. ``own``: y; ``dense``: y_dense for the same rows; ``after``: h after the layer, for the stage that is used
        last; ``output``: ĥ after the layer, with the old weight."""
        if consumer.from_stream:
            assert dense is not None
            return dense, None
        if not stage.differs(consumer):
            return own, None
        if stage.scale is None:
            assert dense is not None
            return (own, dense - own) if self.mix is None else (own + self.mix * (dense - own), None)
        if after is not None and output is not None:
            difference = after - output
        else:
            assert dense is not None and self.pruned is not None
            difference = (
                self.dense[position]
                - self.pruned[position]
                + stage.factor * (dense - own).view_as(self.dense[position])
            )
        # Differences in removed channels of the residual stream cannot be compensated.
        difference = self._without_removed_channels(difference).flatten(0, -2)
        if self.mix is None:
            return own, difference / stage.factor
        return own + self.mix / stage.factor * difference, None

    def _watch(
        self, stage: _Stage, batch: Batch, hidden: torch.Tensor, of: States, *, whole: bool, tried: bool = False
    ) -> _Watched:
        """Run the layer; without ``whole``, only until all consumers of this stage were used. ``of``: the hidden states
        that ``hidden`` is one of; ``tried``: see `ForwardWalk.run`."""
        watched = _Watched()
        waiting = set(stage.consumers)

        watch = WatchProducts(self.model, (), lambda _: None)

        def seen(use: WatchedProduct) -> None:
            watched.uses.append(use.copied())
            watched.rows.append(self.rows.of(batch, use))
            waiting.discard(use.parameter)
            if not whole and not waiting and use.slot is None:
                raise Stop

        with contextlib.suppress(Stop), self.rows.following(watch, stage.consumers):
            watch.add(stage.consumers, seen)
            with watch:
                watched.output = self.walk.run(stage.number, batch, hidden, of.passed, tried=tried)
        return watched


@dataclass(frozen=True)
class _Stage:
    """Consumers of one layer that read the same inputs. ``scale``: see `_Repair._scale`. ``last``: whether one of
    them is the last of the `stream_writers` that is used."""

    number: int
    consumers: Mapping[str, Consumer]
    scale: float | None
    last: bool

    @property
    def factor(self) -> float:
        return 1.0 if self.scale is None else self.scale

    def differs(self, consumer: Consumer) -> bool:
        """Whether the target of a consumer has a share of a difference from the dense model."""
        return not consumer.from_stream and (self.scale is not None or consumer.intact)

    @property
    def is_simple(self) -> bool:
        """Whether the stage is one matrix, used last, whose outputs times `factor` are added to the hidden states."""
        (consumer, *others) = self.consumers.values()
        stacked = len(consumer.shape) > 2
        inside = not consumer.from_stream and not consumer.normed
        return self.last and self.scale is not None and not others and inside and not stacked

    @property
    def is_normed(self) -> bool:
        """Whether removed units are silenced where they are produced, so that targets need another run."""
        return any(consumer.normed for consumer in self.consumers.values())

    @property
    def needs_dense(self) -> bool:
        additive = self.scale is not None
        return (additive and not self.last) or any(
            consumer.from_stream or (consumer.intact and not additive) for consumer in self.consumers.values()
        )


@dataclass
class _Watched:
    """One run of a layer: copies of the products with its consumers, and its output if it ran to the end."""

    uses: list[WatchedProduct] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    output: torch.Tensor | None = None


def _outputs(weight: torch.Tensor, bias: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    """(tokens, out) in float32, computed in the dtype of ``inputs`` (tokens, in)."""
    return functional.linear(inputs, weight.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype)).float()
