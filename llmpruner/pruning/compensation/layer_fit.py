"""Fitting the weights of one layer: the order of their use, their targets, and the fits.

The targets are those of `llmpruner.pruning.compensation.repair`, which also explains the symbols. A `FitStep` has the
matrices of a layer that read the same inputs and are fitted together; `LayerFit` fits them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from ...engine.products import WatchedProduct, WatchProducts
from ...engine.walk import Stop
from .least_squares import Fitter, Matrix, write_all
from .readers import Reader, matrix_of, names_in_layer, stream_writers, swapped

if TYPE_CHECKING:
    from torch import nn

    from ...engine.boundaries import States
    from ...engine.walk import ForwardWalk
    from ...structure.coupling import CouplingGraph
    from .base import Fit
    from .readers import ProducerRows

_DIRECT = 2e-2
"""Largest relative residual for a layer's output to count as its input plus a multiple of its `stream_writers`'
outputs."""


@dataclass(frozen=True)
class FitStep:
    """Weights of one layer that read the same inputs. ``factor``: c, None where the layer's output is not such a sum,
    or where they do not all add to the residual stream. ``last``: whether one of them is the last of the
    `stream_writers` that is used."""

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


def fit_steps(
    walk: ForwardWalk, graph: CouplingGraph, number: int, states: States, readers: Mapping[str, Reader]
) -> tuple[list[FitStep], list[str]]:
    """How layer ``number`` of the dense model uses the matrices of ``readers``: the steps in the order of their use,
    and the names of the biases. ``states``: hidden states before the layer, of which the first is used.

    c is the least-squares solution of change = c · outputs, taken if its relative residual is below `_DIRECT`.
    """
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
    model, writers = walk.execution.model, stream_writers(graph, number)
    with WatchProducts(model, dict.fromkeys([*readers, *writers]), seen):
        change = (walk.run(number, 0, states, tried=True) - states[0]).flatten(0, -2)
    if outputs and all(part.shape == change.shape for part in outputs):
        total = torch.stack(outputs).sum(0)
        solution = float((change * total).sum() / total.square().sum().clamp_min(1e-30))
        if float((change - solution * total).norm()) < _DIRECT * float(change.norm()):
            factor = solution
    last = next((name for name in reversed(uses) if name in writers), None)
    read = [use for name, use in uses.items() if name in readers]
    together = [[use.parameter for use in same] for _, same in groupby(read, key=lambda use: use.inputs.data_ptr())]
    steps = [
        FitStep({n: readers[n] for n in names}, factor if set(writers).issuperset(names) else None, last in names)
        for names in together
    ]
    return steps, names_in_layer(model, graph, number, [use.bias for use in read if use.bias is not None])


@dataclass
class _Run:
    """One run of a layer: copies of the products with the weights of a step, and its output if it ran to the end."""

    uses: list[WatchedProduct] = field(default_factory=list)
    output: torch.Tensor | None = None


@dataclass
class LayerFit:
    """Fits the weights of layer ``number`` in place, step by step.

    ``fitter``, ``mix``: as in `repair`; ``removed_channels``: of the residual stream, int64. Hidden states are one
    tensor (samples, length, hidden size) in float32 for each micro-batch: ``dense`` is h before the layer, ``after`` h
    after it, ``pruned`` ĥ before it, and after it once `fit` returned True. ``producers``: the rows that produce
    removed units, silenced; ``original``: changed weights of the layer, each with a copy of the dense
    model's.
    """

    walk: ForwardWalk
    graph: CouplingGraph
    number: int
    fitter: type[Fitter]
    mix: float
    removed_channels: torch.Tensor
    dense: States
    after: States
    pruned: States
    producers: ProducerRows
    original: Sequence[tuple[torch.Tensor, torch.Tensor]]

    def __post_init__(self) -> None:
        self.model = self.walk.execution.model

    def fit(self, step: FitStep) -> tuple[list[Fit], bool]:
        """The fits of one step, and whether ĥ was moved to after the layer, which needs no further run of it where the
        step `is_simple`."""
        fitters: dict[Matrix, Fitter] = {}
        move = _Move(step, self.pruned, self.model) if step.is_simple else None
        for position in range(len(self.walk.calls)):
            pruned, uncut, dense = self._observe(step, position)
            for use, own in zip(pruned.uses, uncut.uses, strict=True):
                if step.readers[use.parameter].from_stream and use.slot is not None:
                    # Other tokens are routed to the expert in the dense model, so rows do not correspond.
                    continue
                key = use.parameter, use.slot
                target = self._target(step, position, uncut, own, dense.get(key))
                if key not in fitters:
                    fitters[key] = self._fitter(step, key, use.bias)
                fitters[key].add(use, target)
            if move is not None and not move.take(position, pruned):
                move = None
        fitters = self._of_all_processes(step, fitters)
        fits = write_all(fitters, self.model, self.walk.execution.ranks)
        self.producers.zero()
        if move is not None:
            (fitter,) = fitters.values()
            move.finish(fitter.bias)
        return fits, move is not None

    def _observe(self, step: FitStep, position: int) -> tuple[_Run, _Run, dict[Matrix, torch.Tensor]]:
        """The layer on one micro-batch: its run on ĥ with removed units silenced; its run on ĥ with the products that
        targets are of; and the outputs of the matrices in the dense model, (tokens, out), where targets need them."""
        pruned = uncut = self._run(step, position, self.pruned, whole=step.last)
        if any(reader.normed for reader in step.readers.values()):
            # Removed units are silenced where they are produced, so that targets need another run.
            with self.producers.restored():
                uncut = self._run(step, position, self.pruned, whole=step.last, tried=True)
        if not step.needs_dense:
            return pruned, uncut, {}
        with swapped(self.original):
            dense = self._run(step, position, self.dense, whole=False, tried=True)
        return pruned, uncut, {(use.parameter, use.slot): use.outputs.float() for use in dense.uses}

    def _run(self, step: FitStep, position: int, states: States, *, whole: bool, tried: bool = False) -> _Run:
        """Run the layer; without ``whole``, only until all weights of this step were used. ``tried``: see
        `ForwardWalk.run`."""
        run, waiting = _Run(), set(step.readers)

        def seen(use: WatchedProduct) -> None:
            run.uses.append(use.copied())
            waiting.discard(use.parameter)
            if not whole and not waiting and use.slot is None:
                raise Stop

        with contextlib.suppress(Stop), WatchProducts(self.model, step.readers, seen):
            run.output = self.walk.run(self.number, position, states, tried=tried)
        return run

    def _target(
        self, step: FitStep, position: int, uncut: _Run, own: WatchedProduct, dense: torch.Tensor | None
    ) -> torch.Tensor:
        """The target (tokens, out), float32, see `compensation.repair`. ``own``: the product that y is of; ``dense``:
        y_dense for the same rows."""
        outputs = own.outputs.float()
        if step.readers[own.parameter].from_stream:
            assert dense is not None
            return dense
        if step.factor is None:
            return outputs
        if step.last:
            assert uncut.output is not None
            difference = self.after[position] - uncut.output
        else:
            assert dense is not None
            before = self.dense[position]
            difference = before - self.pruned[position] + step.factor * (dense - outputs).view_as(before)
        # Differences in removed channels of the residual stream cannot be compensated.
        difference = difference.index_fill(-1, self.removed_channels.to(difference.device), 0.0)
        return outputs + self.mix / step.factor * difference.flatten(0, -2)

    def _fitter(self, step: FitStep, key: Matrix, bias: torch.Tensor | None) -> Fitter:
        reader = step.readers[key[0]]
        return self.fitter(reader, matrix_of(self.model, reader, key[1]), bias)

    def _of_all_processes(self, step: FitStep, fitters: Mapping[Matrix, Fitter]) -> dict[Matrix, Fitter]:
        """Fitters of the matrices that any process has one for: a process may have no tokens for an expert."""
        biases = {
            key: names_in_layer(self.model, self.graph, self.number, [] if fitter.bias is None else [fitter.bias])
            for key, fitter in fitters.items()
        }
        merged: dict[Matrix, Fitter] = {}
        for key, names in self.walk.execution.ranks.merged(biases).items():
            if key in fitters:
                merged[key] = fitters[key]
            else:
                bias = self.model.get_parameter(names[0]).data if names else None
                # The bias of one expert is a row of that of all.
                row = bias if bias is None or bias.dim() == 1 or key[1] is None else bias[key[1]]
                merged[key] = self._fitter(step, key, row)
        return merged


class _Move:
    """Moves ĥ of a simple step to after the layer without running it again: what remains without the outputs of the
    matrix, and its inputs, kept until its new value is known."""

    def __init__(self, step: FitStep, pruned: States, model: nn.Module) -> None:
        assert step.factor is not None
        (reader,) = step.readers.values()
        self.matrix = matrix_of(model, reader, None)
        self.kept = reader.kept.to(self.matrix.device)
        self.factor, self.pruned, self.inputs = step.factor, pruned, pruned.empty()

    def take(self, position: int, run: _Run) -> bool:
        """Take one micro-batch; False, and no change, where the run has not just one product and an output."""
        if run.output is None or len(run.uses) != 1:
            return False
        (use,) = run.uses
        self.pruned[position] = run.output - self.factor * use.outputs.float().view_as(run.output)
        self.inputs.append(use.inputs.index_select(1, self.kept))
        return True

    def finish(self, bias: torch.Tensor | None) -> None:
        """Add the outputs of the fitted matrix, computed in the dtype of its inputs."""
        weight = self.matrix.index_select(1, self.kept)
        for position, inputs in enumerate(self.inputs):
            rest, dtype = self.pruned[position], inputs.dtype
            outputs = functional.linear(inputs, weight.to(dtype), None if bias is None else bias.to(dtype)).float()
            self.pruned[position] = rest + self.factor * outputs.view_as(rest)
