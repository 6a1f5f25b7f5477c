"""The walk that fits consumers again, layer after layer, on the already repaired prefix.

Two streams of hidden states go through the decoder: the dense model's and the pruned one's. At each layer the weights
that read cut units are fitted so that the pruned stream says what the dense one would. Cut units are silenced in
place; nothing changes shape here, so that surgery afterwards removes exactly what is silent already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from ..engine.inputs import WatchInputs
from ..engine.walk import Batch, Enough, ForwardWalk
from ..engine.watch import WatchedProduct, WatchProducts
from ..progress import Progress
from ..structure.coupling import CouplingGraph, Role
from ..structure.kept import removed_layers
from .choose import Chooser
from .collect import MeanLoss, Refit
from .consumers import Consumer, consumers_of, matrix_of, silence_inputs, writers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.calibration import CalibrationSet
    from ..structure.kept import Kept

MIX = 0.5
_DIRECT = 2e-2
"""Largest relative residual with which a layer still counts as the sum of its input and its writers' outputs."""


@dataclass(frozen=True)
class Fit:
    """How one weight was fitted: on how many rows of inputs, and with which ridge (None: it stayed as it was)."""

    parameter: str
    slot: int | None
    rows: int
    ridge: float | None


@dataclass(frozen=True)
class Repaired:
    """What a repair did. ``kept``: the units that stay, as planned or as a `Chooser` chose them."""

    kept: dict[str, Sequence[int]]
    fits: list[Fit]


@torch.no_grad()
def repair(
    model: PreTrainedModel,
    graph: CouplingGraph,
    kept: Kept,
    calibration: CalibrationSet,
    *,
    method: str = "refit",
    mix: float = MIX,
    chooser: Chooser | None = None,
    progress: Progress | None = None,
) -> Repaired:
    """Fit every consumer of a cut unit again, in place, and silence the units that ``kept`` leaves out.

    ``method``: ``refit`` fits weights and biases; ``bias`` adds the mean of what is lost to the biases alone (FLAP; An
    et al., 2024, eq. 7) and raises `UnsupportedModelError` where a consumer has none. Experts and vocabulary rows
    that go are silenced by surgery alone. Raises it too for a decoder that cannot be walked layer by layer.

    ``mix``: where the target lies between the layer's own dense output on the pruned stream (0), which keeps the layer
    as it was, and what brings the stream back to the dense model's (1), which makes good what earlier layers lost.

    ``chooser``: says which units of a layer stay when the walk comes to it; ``kept`` then only says how many.
    """
    walk = ForwardWalk.over(model, graph.layers, calibration)
    collect = MeanLoss if method == "bias" else Refit
    return _Repair(model, graph, kept, walk, mix, collect, chooser).run(progress or Progress())


class _Repair:
    def __init__(
        self,
        model: PreTrainedModel,
        graph: CouplingGraph,
        kept: Kept,
        walk: ForwardWalk,
        mix: float,
        collect: type[Refit | MeanLoss],
        chooser: Chooser | None,
    ) -> None:
        self.model, self.graph, self.kept, self.walk, self.mix = model, graph, dict(kept), walk, mix
        self.collect, self.chooser = collect, chooser
        self.dense = [batch.hidden for batch in walk.batches]
        self.gone = _cut_channels(graph, kept)
        self.pruned = self.dense
        if len(self.gone):
            self.pruned = [self._without_cut_channels(hidden) for hidden in self.dense]
        self.fits: list[Fit] = []

    def run(self, progress: Progress) -> Repaired:
        removed = removed_layers(self.graph, self.kept)
        consumers = [consumers_of(self.graph, self.kept, number) for number in range(self.graph.num_layers)]
        last = max((number for number, found in enumerate(consumers) if found), default=-1)
        for number in progress.track(range(last + 1), "Compensating"):
            after = self._behind(number, consumers[number])
            if number not in removed:
                # The chooser may have said otherwise which inputs stay.
                self._layer(number, consumers_of(self.graph, self.kept, number), after)
            self.dense = after
        return Repaired(self.kept, self.fits)

    def _behind(self, number: int, consumers: Mapping[str, Consumer]) -> list[torch.Tensor]:
        """The dense stream behind the layer. On the way, the chooser sees what weights read."""
        if self.chooser is None or not consumers:
            return [self.walk.run(number, batch, hidden) for batch, hidden in self._with(self.dense)]
        with WatchInputs(self.model, consumers, gram=self.chooser.gram) as watched:
            after = [self.walk.run(number, batch, hidden) for batch, hidden in self._with(self.dense)]
        inputs = watched.statistics(self.walk.tokens)
        self.kept |= self.chooser.choose(self.model, self.graph, self.kept, number, inputs)
        return after

    def _with(self, states: Sequence[torch.Tensor]) -> Iterator[tuple[Batch, torch.Tensor]]:
        return zip(self.walk.batches, states, strict=True)

    def _layer(self, number: int, consumers: Mapping[str, Consumer], after: list[torch.Tensor]) -> None:
        if not consumers and self.pruned is self.dense:
            # Nothing was cut so far: both streams are one.
            self.pruned = after
            return
        scale = self._scale(number) if consumers else None
        silence = _Silence(self.model, self.graph, self.kept, number)
        biases, order = self._order(number, consumers) if consumers else ([], [])
        stages = [
            _Stage(number, found, scale, after if position == len(order) - 1 else None)
            for position, found in enumerate(order)
        ]
        changed = [*(self.model.get_parameter(name) for name in consumers), *biases, *silence.parameters]
        was = _AsItWas(changed if any(stage.needs_dense for stage in stages) else [])
        silence()
        behind: list[torch.Tensor] | None = None
        for stage in stages:
            behind = self._fit(stage, silence, was)
        for consumer in consumers.values():
            # Experts that no token reached, and weights that no product was seen of, are not fitted.
            silence_inputs(self.model, consumer)
        fitted = {fit.parameter for fit in self.fits}
        self.fits += [Fit(name, None, 0, None) for name in consumers if name not in fitted]
        self.pruned = behind or [self.walk.run(number, b, hidden) for b, hidden in self._with(self.pruned)]

    def _scale(self, number: int) -> float | None:
        """c, where the layer's output is its input plus c times what its writers say; None where it is not so."""
        said: list[torch.Tensor] = []
        batch, hidden = self.walk.batches[0], self.dense[0]
        with WatchProducts(self.model, writers_of(self.graph, number), lambda use: said.append(use.outputs.float())):
            change = (self.walk.run(number, batch, hidden) - hidden).flatten(0, -2)
        if not said or any(part.shape != change.shape for part in said):
            return None
        total = torch.stack(said).sum(0)
        scale = float((change * total).sum() / total.square().sum().clamp_min(1e-30))
        return scale if float((change - scale * total).norm()) < _DIRECT * float(change.norm()) else None

    def _order(
        self, number: int, consumers: Mapping[str, Consumer]
    ) -> tuple[list[torch.Tensor], list[dict[str, Consumer]]]:
        """The consumers in the order in which the layer uses them, those that read the same inputs together; and the
        biases that are added with them."""
        uses: dict[str, WatchedProduct] = {}

        # All uses are kept until the end, so that no later inputs come to lie where earlier ones lay.
        def seen(use: WatchedProduct) -> None:
            uses.setdefault(use.parameter, use)

        with WatchProducts(self.model, consumers, seen):
            self.walk.run(number, self.walk.batches[0], self.pruned[0])
        together = groupby(uses.values(), key=lambda use: use.inputs.data_ptr())
        stages = [{use.parameter: consumers[use.parameter] for use in same} for _, same in together]
        return [use.bias for use in uses.values() if use.bias is not None], stages

    def _without_cut_channels(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.index_fill(-1, self.gone.to(hidden.device), 0.0)

    def _fit(self, stage: _Stage, silence: _Silence, was: _AsItWas) -> list[torch.Tensor] | None:
        """Fit the weights of one stage; returns the pruned stream behind the layer, where it can be had from what the
        layer said before without running it again."""
        sums: dict[tuple[str, int | None], Refit | MeanLoss] = {}
        last: list[tuple[torch.Tensor, torch.Tensor]] = []
        for position, (batch, hidden) in enumerate(self._with(self.pruned)):
            pruned = self._watch(stage, batch, hidden, whole=stage.behind is not None)
            said_there: dict[tuple[str, int | None], torch.Tensor] = {}
            if stage.needs_dense:
                with was.swapped_in():
                    dense = self._watch(stage, batch, self.dense[position], whole=False)
                said_there = {(use.parameter, use.slot): use.outputs.float() for use in dense.uses}
            for use in pruned.uses:
                consumer = stage.consumers[use.parameter]
                if consumer.from_stream and use.slot is not None:
                    # Other tokens reach an expert in the dense model, so its outputs there are no target.
                    continue
                key = use.parameter, use.slot
                target = self._target(stage, consumer, use, said_there.get(key), position, pruned.output)
                if key not in sums:
                    sums[key] = self.collect(consumer, use)
                sums[key].add(use, target)
            if stage.is_simple and pruned.output is not None and len(pruned.uses) == 1:
                (use,) = pruned.uses
                said = stage.factor * use.outputs.float().view_as(pruned.output)
                last.append((pruned.output - said, use.inputs))
        for (name, slot), collected in sums.items():
            rows, ridge = collected.write(self.model, slot)
            self.fits.append(Fit(name, slot, rows, ridge))
        silence()
        if len(last) < len(self.pruned):
            return None
        (collected,) = sums.values()
        (name,) = stage.consumers
        weight = matrix_of(self.model, stage.consumers[name], None)
        return [rest + stage.factor * _says(weight, collected.bias, inputs).view_as(rest) for rest, inputs in last]

    def _target(
        self,
        stage: _Stage,
        consumer: Consumer,
        use: WatchedProduct,
        there: torch.Tensor | None,
        position: int,
        output: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the rows of ``use`` should have said. ``there``: what the dense model says in their place; ``output``:
        the pruned stream behind the layer, with this weight as it was."""
        own = use.outputs.float()
        if consumer.from_stream:
            assert there is not None
            return there
        if stage.scale is None:
            return own
        if stage.behind is not None and output is not None:
            lag = stage.behind[position] - output
        else:
            assert there is not None
            lag = (
                self.dense[position]
                - self.pruned[position]
                + stage.factor * (there - own).view_as(self.dense[position])
            )
        # What cut channels have lost, nothing can say.
        return own + self.mix / stage.factor * self._without_cut_channels(lag).flatten(0, -2)

    def _watch(self, stage: _Stage, batch: Batch, hidden: torch.Tensor, *, whole: bool) -> _Watched:
        """Run the layer; without ``whole`` only as far as the consumers of this stage."""
        watched = _Watched()
        waiting = set(stage.consumers)

        def seen(use: WatchedProduct) -> None:
            watched.uses.append(use)
            waiting.discard(use.parameter)
            if not whole and not waiting and use.slot is None:
                raise Enough

        with WatchProducts(self.model, stage.consumers, seen), contextlib.suppress(Enough):
            watched.output = self.walk.run(stage.number, batch, hidden)
        return watched


@dataclass(frozen=True)
class _Stage:
    """Consumers of one layer that read the same inputs. ``scale``: see `_Repair._scale`. ``behind``: the dense stream
    behind the layer, batch by batch, where no other consumer follows."""

    number: int
    consumers: Mapping[str, Consumer]
    scale: float | None
    behind: list[torch.Tensor] | None

    @property
    def factor(self) -> float:
        return 1.0 if self.scale is None else self.scale

    @property
    def is_simple(self) -> bool:
        """Whether the stage is one matrix whose outputs are added to the stream, with nothing after it."""
        (consumer, *others) = self.consumers.values()
        return self.behind is not None and self.scale is not None and not others and not consumer.from_stream

    @property
    def needs_dense(self) -> bool:
        from_stream = any(consumer.from_stream for consumer in self.consumers.values())
        return from_stream or (self.scale is not None and self.behind is None)


@dataclass
class _Watched:
    uses: list[WatchedProduct] = field(default_factory=list)
    output: torch.Tensor | None = None


def _says(weight: torch.Tensor, bias: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    """Outputs (n, out) in float32, computed in the precision of ``inputs`` (n, in)."""
    return functional.linear(inputs, weight.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype)).float()


class _Silence:
    """Sets the rows of one layer to zero that produce cut units with a norm over them."""

    def __init__(self, model: PreTrainedModel, graph: CouplingGraph, kept: Kept, number: int) -> None:
        self._rows: list[tuple[torch.Tensor, int, torch.Tensor]] = []
        for name, units in kept.items():
            group = graph.by_name[name]
            gone = sorted(set(range(group.units)) - set(units)) if group.is_normalized else []
            for span in group.spans_with(Role.PRODUCES):
                if gone and span.parameter.startswith(f"{graph.layers}.{number}."):
                    parameter = model.get_parameter(span.parameter)
                    index = torch.tensor(span.indices(gone), device=parameter.device)
                    self._rows.append((parameter, span.axis, index))

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [parameter for parameter, _, _ in self._rows]

    def __call__(self) -> None:
        for parameter, axis, index in self._rows:
            parameter.index_fill_(axis, index, 0.0)


class _AsItWas:
    """Parameters of one layer as they were before anything was fitted or silenced."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._pairs = [(p, p.detach().clone()) for p in {id(p): p for p in parameters}.values()]

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for parameter, other in self._pairs:
            parameter.data, other.data = other.data, parameter.data


def _cut_channels(graph: CouplingGraph, kept: Kept) -> torch.Tensor:
    """The channels of the residual stream that go."""
    gone: set[int] = set()
    for name, units in kept.items():
        group = graph.by_name[name]
        if group.is_normalized and group.layer is None:
            norm = next(group.spans_with(Role.NORM, Role.LAYER_NORM))
            gone.update(norm.indices(set(range(group.units)) - set(units)))
    return torch.tensor(sorted(gone), dtype=torch.long)
