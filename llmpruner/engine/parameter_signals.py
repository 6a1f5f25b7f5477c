"""The signals of parameters, layer by layer: from their weights alone, from a forward pass, or from gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..errors import ModelError
from .gradients import GradientSums, GradientWalk, requiring_grad
from .products import Measure, ReduceProducts
from .signals import GRADIENTS, InputStats, ParameterSignals, Position, ProductStats, Signal, positions
from .statistics import Measured, forward_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..calibration.calibration import CalibrationSet
    from ..models.weights import Weights
    from ..progress import Progress
    from ..structure.coupling import CouplingGraph
    from .execution import Execution

_INPUTS = frozenset({Signal.INPUT_STATS, Signal.GRAM})


def walk_signals(
    execution: Execution,
    graph: CouplingGraph,
    wanted: Collection[str],
    needs: Collection[Signal],
    calibration: CalibrationSet | None,
    seed: int,
    progress: Progress,
    measure: Measure | None = None,
    *,
    by_matrix: bool = False,
) -> Iterator[tuple[str, ParameterSignals]]:
    """Yield every parameter of ``wanted`` once, with the signals in ``needs``. To save memory, keep no reference to
    them.

    ``measure``: `ImportanceCriterion.measure`, for `Signal.PRODUCT` and `Signal.PRODUCT_GRAD`. ``by_matrix``: a stack
    of matrices is yielded matrix by matrix instead.

    Memory without gradients: that of `forward_statistics`. With gradients: hidden states between all layers (see
    `gradients.py`), one layer's gradients, and the statistics of the inputs of all layers if they are needed too.
    Raises `ModelError` without a calibration set, or for values that are not finite.
    """
    make = _Signals(execution.model, positions(graph), frozenset(needs), seed, by_matrix)
    if set(needs) <= {Signal.WEIGHT}:
        yield from _of_weights(execution.weights, wanted, make)
        return
    if calibration is None:
        raise ModelError("this criterion runs the model and needs a calibration set")
    number_of_samples = len(calibration.input_ids)

    def reduce(names: Collection[str]) -> ReduceProducts:
        assert measure is not None, "statistics of products need a function that measures them"
        gradients = Signal.PRODUCT_GRAD in needs
        return ReduceProducts(execution.model, names, make.where, measure, number_of_samples, gradients=gradients)

    forward = _forward(execution, wanted, needs, calibration, progress, reduce)
    if GRADIENTS.intersection(needs):
        yield from _of_gradients(execution, graph, wanted, calibration, progress, make, dict(forward), reduce)
        return
    rest = set(wanted)
    for name, found in forward:
        rest.discard(name)
        yield from make(name, found=found)
    yield from _of_weights(execution.weights, rest, make)


@dataclass(frozen=True)
class _Signals:
    """Makes the signals of a parameter from what was measured of it. ``where``: parameter → position in the decoder."""

    model: PreTrainedModel
    where: Mapping[str, Position]
    needs: frozenset[Signal]
    seed: int
    by_matrix: bool

    def __call__(
        self, name: str, sums: GradientSums | None = None, found: Measured | None = None
    ) -> Iterator[tuple[str, ParameterSignals]]:
        inputs, products = (found.inputs, found.products) if found else (None, None)
        parts = signals_of(
            self.model, name, self.where[name], sums, inputs, products, self.needs, self.seed, by_matrix=self.by_matrix
        )
        return ((name, part) for part in parts)


def _of_weights(weights: Weights, names: Collection[str], make: _Signals) -> Iterator[tuple[str, ParameterSignals]]:
    """Of parameters of which nothing was measured, layer by layer."""
    by_part: dict[int | None, list[str]] = {}
    for name in sorted(names):
        by_part.setdefault(weights.number(name), []).append(name)
    for part in sorted(by_part, key=lambda number: -1 if number is None else number):
        with weights.part(part):
            for name in by_part[part]:
                yield from make(name)


def _forward(
    execution: Execution,
    wanted: Collection[str],
    needs: Collection[Signal],
    calibration: CalibrationSet,
    progress: Progress,
    reduce: Callable[[Collection[str]], ReduceProducts],
) -> Iterator[tuple[str, Measured]]:
    """What a forward pass measures of parameters: none, where only gradients are needed."""
    inputs = bool(_INPUTS.intersection(needs))
    products = Signal.PRODUCT in needs and Signal.PRODUCT_GRAD not in needs
    if inputs or products:
        for layer in forward_statistics(
            execution, wanted, calibration, progress,
            inputs=inputs, gram=Signal.GRAM in needs, reduce=reduce if products else None,
        ):  # fmt: skip
            yield from layer.items()


def _of_gradients(
    execution: Execution,
    graph: CouplingGraph,
    wanted: Collection[str],
    calibration: CalibrationSet,
    progress: Progress,
    make: _Signals,
    forward: Mapping[str, Measured],
    reduce: Callable[[Collection[str]], ReduceProducts],
) -> Iterator[tuple[str, ParameterSignals]]:
    """From a backward pass, the last layer first. ``forward``: what the forward pass measured."""
    of_products = Signal.PRODUCT_GRAD in make.needs
    squares = Signal.GRAD_SQ in make.needs
    differentiated = wanted if {Signal.GRAD, Signal.GRAD_SQ}.intersection(make.needs) else ()
    outer = sorted(name for name in wanted if not graph.is_decoder(name))
    by_layer: dict[int, list[str]] = {}
    for name in sorted(wanted):
        if (layer := graph.layer_of(name)) is not None:
            by_layer.setdefault(layer, []).append(name)
    lowest = 0 if outer and differentiated else min(by_layer, default=graph.num_layers)
    with requiring_grad((), freeze=execution.model):
        walk = GradientWalk(
            execution, calibration,
            per_sample=squares, outer=outer if differentiated else (), exact=bool(differentiated),
        )  # fmt: skip
        walk.forward()
        walk.backward_head()
        for number in progress.track(range(graph.num_layers - 1, lowest - 1, -1), "Measuring importance"):
            names = by_layer.get(number, [])
            with execution.weights.layer(number):
                reduced = reduce(names) if of_products else None
                sums = walk.backward_layer(number, differentiated, squares=squares, reduced=reduced)
                products = reduced.statistics(execution.ranks) if reduced else {}
                for name in names:
                    found = replace(forward.get(name, Measured(None, None)), products=products.get(name))
                    yield from make(name, sums.pop(name, None), found)
        if outer:
            with execution.weights.outside():
                sums = walk.backward_outer(outer, squares=squares) if differentiated else {}
                for name in outer:
                    yield from make(name, sums.pop(name, None))


def signals_of(
    model: PreTrainedModel,
    name: str,
    position: Position,
    sums: GradientSums | None,
    inputs: InputStats | None,
    products: ProductStats | None,
    needs: Collection[Signal],
    seed: int,
    *,
    by_matrix: bool = False,
) -> Iterator[ParameterSignals]:
    """The signals of one parameter; ``by_matrix``: of each matrix of a stack in turn, so that one is in float32 at a
    time. Raises `ModelError` when its values are not finite."""
    parameter = model.get_parameter(name).detach()
    if not bool(torch.isfinite(parameter.sum(dtype=torch.float32))):
        raise ModelError(f"parameter '{name}' holds NaN or infinite values; the checkpoint is damaged")
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    grad = sums.grad if sums is not None and Signal.GRAD in needs else None
    grad_sq = sums.grad_sq if sums is not None and Signal.GRAD_SQ in needs else None
    dtype = torch.float32 if Signal.WEIGHT in needs else parameter.dtype
    if not (by_matrix and parameter.dim() == 3):
        grad = None if grad is None else grad.float()
        yield ParameterSignals(parameter.to(dtype), grad, grad_sq, generator, inputs, products, position)
        return
    for number in range(len(parameter)):
        one = slice(number, number + 1)
        yield ParameterSignals(
            parameter[one].to(dtype),
            None if grad is None else grad[one].float(),
            None if grad_sq is None else grad_sq[one],
            generator,
            inputs and inputs.of_matrix(number),
            products and products.of_matrix(number),
            position,
            number,
        )
