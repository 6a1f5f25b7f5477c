"""Stages: matrices of one layer that read the same inputs and are fitted together. `Stage` describes one, `StageFits`
fits them; the targets are those of `llmpruner.pruning.compensation.repair`, which also explains the symbols."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from ...engine.products import WatchedProduct, WatchProducts
from ...engine.walk import Batch, Stop
from .consumers import Consumer, matrix_of
from .fitters import Fitter, Matrix, write_all
from .layer_order import names_in_layer
from .rows import CalibrationRows, Rows

if TYPE_CHECKING:
    from ...engine.boundaries import States
    from ...engine.walk import ForwardWalk
    from ...structure.coupling import CouplingGraph
    from .base import Fit
    from .silencing import Originals, ProducerRows


@dataclass(frozen=True)
class Stage:
    """Consumers of layer ``number`` that read the same inputs. ``factor``: c, None where the layer's output is not such
    a sum, or where they do not all add to the residual stream. ``last``: whether one of them is the last of the
    `stream_writers` that is used."""

    number: int
    consumers: Mapping[str, Consumer]
    factor: float | None
    last: bool

    @property
    def times(self) -> float:
        """`factor`, 1 where there is none."""
        return 1.0 if self.factor is None else self.factor

    def differs(self, consumer: Consumer) -> bool:
        """Whether the target of a consumer has a share of a difference from the dense model."""
        return not consumer.from_stream and (self.factor is not None or consumer.intact)

    @property
    def is_simple(self) -> bool:
        """Whether the stage is one matrix, used last, whose outputs times c are added to the hidden states."""
        (consumer, *others) = self.consumers.values()
        stacked = len(consumer.shape) > 2
        inside = not consumer.from_stream and not consumer.normed
        return self.last and self.factor is not None and not others and inside and not stacked

    @property
    def is_normed(self) -> bool:
        """Whether removed units are silenced where they are produced, so that targets need another run."""
        return any(consumer.normed for consumer in self.consumers.values())

    @property
    def needs_dense(self) -> bool:
        """Whether targets need the outputs of the matrices in the dense model."""
        additive = self.factor is not None
        return (additive and not self.last) or any(
            consumer.from_stream or (consumer.intact and not additive) for consumer in self.consumers.values()
        )


@dataclass(frozen=True)
class LayerStates:
    """Hidden states of the layer that is fitted, one tensor (samples, length, hidden size) in float32 for each
    micro-batch. ``dense``: h before the layer; ``after``: h after it; ``pruned``: ĥ before it, and after it once
    `StageFits.fit` returned True."""

    dense: States
    after: States
    pruned: States


class StageFits:
    """Fits the weights of stages in place. ``fitter``, ``mix``: as in `repair`; ``rows``: the weights of tokens;
    ``removed_channels``: of the residual stream, int64."""

    def __init__(
        self,
        walk: ForwardWalk,
        graph: CouplingGraph,
        fitter: type[Fitter],
        mix: float | None,
        rows: CalibrationRows,
        removed_channels: torch.Tensor,
    ) -> None:
        self.walk, self.graph, self.model = walk, graph, walk.execution.model
        self.fitter, self.mix, self.rows, self.removed_channels = fitter, mix, rows, removed_channels

    def silenced(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` with zeros in removed channels of the residual stream."""
        return hidden.index_fill(-1, self.removed_channels.to(hidden.device), 0.0)

    def fit(
        self, stage: Stage, states: LayerStates, producers: ProducerRows, original: Originals
    ) -> tuple[list[Fit], bool]:
        """The fits of one stage, and whether ĥ was moved to after the layer, which needs no further run of it where the
        stage `is_simple`. ``producers``: the rows that produce removed units, silenced; ``original``: the values of the
        layer's weights in the dense model."""
        fitters: dict[Matrix, Fitter] = {}
        move = _Move(stage, states.pruned, self._kept_inputs(stage)) if stage.is_simple else None
        for position in range(len(self.walk.batches)):
            seen = self._observe(stage, states, position, producers, original)
            for use, own, rows in zip(seen.pruned.uses, seen.uncut.uses, seen.pruned.rows, strict=True):
                if stage.consumers[use.parameter].from_stream and use.slot is not None:
                    # Other tokens are routed to the expert in the dense model, so rows do not correspond.
                    continue
                key = use.parameter, use.slot
                target, toward = self._target(stage, seen, own)
                if key not in fitters:
                    fitters[key] = self._fitter(stage, key, use.bias)
                fitters[key].add(use, target, rows, toward)
            if move is not None and not move.take(position, seen.pruned):
                move = None
        fitters = self._of_all(stage, fitters)
        fits = write_all(fitters, self.model, self.walk.ranks)
        producers.zero()
        if move is not None:
            (fitter,), (consumer,) = fitters.values(), stage.consumers.values()
            move.finish(matrix_of(self.model, consumer, None), fitter.bias)
        return fits, move is not None

    def _kept_inputs(self, stage: Stage) -> torch.Tensor:
        consumer = next(iter(stage.consumers.values()))
        return consumer.kept.to(self.model.get_parameter(consumer.parameter).device)

    def _observe(
        self, stage: Stage, states: LayerStates, position: int, producers: ProducerRows, original: Originals
    ) -> _Observed:
        """Run the layer on one micro-batch, as often as the targets of the stage need."""
        batch, hidden = self.walk.batches[position], states.pruned[position]
        pruned = uncut = self._watch(stage, batch, hidden, states.pruned, whole=stage.last)
        if stage.is_normed:
            with producers.restored():
                uncut = self._watch(stage, batch, hidden, states.pruned, whole=stage.last, tried=True)
        dense: dict[Matrix, torch.Tensor] = {}
        if stage.needs_dense:
            with original.swapped_in():
                found = self._watch(stage, batch, states.dense[position], states.dense, whole=False, tried=True)
            dense = {(use.parameter, use.slot): use.outputs.float() for use in found.uses}
        return _Observed(states, position, pruned, uncut, dense)

    def _watch(
        self, stage: Stage, batch: Batch, hidden: torch.Tensor, of: States, *, whole: bool, tried: bool = False
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

    def _target(self, stage: Stage, seen: _Observed, own: WatchedProduct) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The target (tokens, out), see `compensation.repair`, and d / c, of which the fit chooses a share;
        None where it chooses none. ``own``: the product that y is of."""
        consumer, outputs = stage.consumers[own.parameter], own.outputs.float()
        dense = seen.dense.get((own.parameter, own.slot))
        if consumer.from_stream:
            assert dense is not None
            return dense, None
        if not stage.differs(consumer):
            return outputs, None
        if stage.factor is None:
            assert dense is not None
            difference = dense - outputs
            return (outputs, difference) if self.mix is None else (outputs + self.mix * difference, None)
        # Differences in removed channels of the residual stream cannot be compensated.
        difference = self.silenced(seen.difference(stage, outputs, dense)).flatten(0, -2)
        if self.mix is None:
            return outputs, difference / stage.factor
        return outputs + self.mix / stage.factor * difference, None

    def _fitter(self, stage: Stage, key: Matrix, bias: torch.Tensor | None) -> Fitter:
        consumer = stage.consumers[key[0]]
        mixed = self.mix is None and stage.differs(consumer)
        return self.fitter(consumer, matrix_of(self.model, consumer, key[1]), bias, mixed=mixed)

    def _of_all(self, stage: Stage, fitters: Mapping[Matrix, Fitter]) -> dict[Matrix, Fitter]:
        """Fitters of the matrices that any process has one for: a process may have no tokens for an expert."""

        def bias_of(fitter: Fitter) -> str | None:
            if fitter.bias is None:
                return None
            return next(iter(names_in_layer(self.model, self.graph, stage.number, [fitter.bias])), None)

        found: dict[Matrix, Fitter] = {}
        for key, name in self.walk.ranks.merged({key: bias_of(fitter) for key, fitter in fitters.items()}).items():
            if key in fitters:
                found[key] = fitters[key]
            else:
                bias = None if name is None else self.model.get_parameter(name).data
                # The bias of one expert is a row of that of all.
                row = bias if bias is None or bias.dim() == 1 or key[1] is None else bias[key[1]]
                found[key] = self._fitter(stage, key, row)
        return found


@dataclass
class _Watched:
    """One run of a layer: copies of the products with the consumers of a stage, and its output if it ran to the end."""

    uses: list[WatchedProduct] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    output: torch.Tensor | None = None


@dataclass(frozen=True)
class _Observed:
    """The runs of a layer on micro-batch ``position``: on ĥ with removed units silenced, on ĥ with the products that
    the targets are of, and the outputs of the matrices in the dense model, float32 (tokens, out)."""

    states: LayerStates
    position: int
    pruned: _Watched
    uncut: _Watched
    dense: Mapping[Matrix, torch.Tensor]

    def difference(self, stage: Stage, own: torch.Tensor, dense: torch.Tensor | None) -> torch.Tensor:
        """d, (samples, length, hidden size), in float32. ``own``: y; ``dense``: y_dense for the same rows, which a
        stage that is used last does not need."""
        if stage.last:
            assert self.uncut.output is not None
            return self.states.after[self.position] - self.uncut.output
        assert dense is not None
        before = self.states.dense[self.position]
        return before - self.states.pruned[self.position] + stage.times * (dense - own).view_as(before)


class _Move:
    """Moves ĥ of a simple stage to after the layer without running it again: what remains without the outputs of the
    matrix, and its inputs, kept until its new value is known."""

    def __init__(self, stage: Stage, pruned: States, kept: torch.Tensor) -> None:
        self.stage, self.pruned, self.kept, self.inputs = stage, pruned, kept, pruned.beside()

    def take(self, position: int, run: _Watched) -> bool:
        """Take one micro-batch; False, and no change, where the run has not just one product and an output."""
        if run.output is None or len(run.uses) != 1:
            return False
        (use,) = run.uses
        self.pruned[position] = run.output - self.stage.times * use.outputs.float().view_as(run.output)
        self.inputs.append(use.inputs.index_select(1, self.kept))
        return True

    def finish(self, matrix: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Add the outputs of the fitted ``matrix`` (out, in), computed in the dtype of its inputs."""
        weight = matrix.index_select(1, self.kept)
        for position, inputs in enumerate(self.inputs):
            rest, dtype = self.pruned[position], inputs.dtype
            outputs = functional.linear(inputs, weight.to(dtype), None if bias is None else bias.to(dtype)).float()
            self.pruned[position] = rest + self.stage.times * outputs.view_as(rest)
