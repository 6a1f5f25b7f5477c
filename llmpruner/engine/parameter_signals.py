"""The signals of parameters, layer by layer: from their weights alone, from a forward pass, or from gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..errors import ModelError
from .gradients import GradientSums, GradientWalk, requiring_grad
from .products import Measure, ReduceProducts
from .signals import GRADIENTS, ParameterSignals, Signal, kinds_read
from .statistics import NOTHING, Measured, forward_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..calibration.calibration import CalibrationSet
    from ..models.weights import Weights
    from ..structure.coupling import CouplingGraph
    from .execution import Execution

Named = Iterator[tuple[str, ParameterSignals]]


def walk_signals(
    execution: Execution,
    graph: CouplingGraph,
    wanted: Collection[str],
    needs: Collection[Signal],
    calibration: CalibrationSet | None,
    seed: int,
    measure: Measure | None = None,
    *,
    by_matrix: bool = False,
) -> Named:
    """Yield every parameter of ``wanted`` once, with the signals in ``needs``. To save memory, keep no reference to
    them.

    ``measure``: `ImportanceCriterion.measure`, for `Signal.PRODUCT` and `Signal.PRODUCT_GRAD`. ``by_matrix``: a stack
    of matrices is yielded matrix by matrix instead.

    Memory without gradients: that of `forward_statistics`. With gradients: hidden states between all layers (see
    `gradients.py`), one layer's gradients, and the statistics of the inputs of all layers if they are needed too.
    Raises `ModelError` for values that are not finite.
    """
    needed = frozenset(needs)
    make = partial(_signals, execution.model, needed, seed, by_matrix)
    if needed <= {Signal.WEIGHT}:
        yield from _of_weights(execution.weights, wanted, make)
        return
    assert calibration is not None, "all signals but weights are measured on text"
    samples, gradients, reads = len(calibration.input_ids), Signal.PRODUCT_GRAD in needed, kinds_read(graph)

    def reduce(names: Collection[str]) -> ReduceProducts:
        assert measure is not None, "statistics of products need a function that measures them"
        return ReduceProducts(execution.model, names, reads, measure, samples, gradients=gradients)

    def forward() -> Iterator[tuple[str, Measured]]:
        inputs = bool(needed & {Signal.INPUT_STATS, Signal.GRAM})
        products = reduce if Signal.PRODUCT in needed and not gradients else None
        if inputs or products:
            gram = Signal.GRAM in needed
            for layer in forward_statistics(execution, wanted, calibration, inputs=inputs, gram=gram, reduce=products):
                yield from layer.items()

    if needed & GRADIENTS:
        reduced = reduce if gradients else None
        yield from _of_gradients(execution, graph, wanted, needed, calibration, dict(forward()), reduced, make)
        return
    rest = set(wanted)
    for name, measured in forward():
        rest.discard(name)
        yield from make(name, measured)
    yield from _of_weights(execution.weights, rest, make)


def _of_weights(weights: Weights, names: Collection[str], make: Callable[[str], Named]) -> Named:
    """Of parameters of which nothing was measured, layer by layer."""
    by_part: dict[int | None, list[str]] = {}
    for name in sorted(names):
        by_part.setdefault(weights.number(name), []).append(name)
    for part in sorted(by_part, key=lambda number: -1 if number is None else number):
        with weights.part(part):
            for name in by_part[part]:
                yield from make(name)


def _of_gradients(
    execution: Execution,
    graph: CouplingGraph,
    wanted: Collection[str],
    needs: frozenset[Signal],
    calibration: CalibrationSet,
    forward: Mapping[str, Measured],
    reduce: Callable[[Collection[str]], ReduceProducts] | None,
    make: Callable[[str, Measured, GradientSums | None], Named],
) -> Named:
    """From a backward pass, the last layer first. ``forward``: what the forward pass measured."""
    differentiated = wanted if {Signal.GRAD, Signal.GRAD_SQ} & needs else ()
    outer = sorted(name for name in wanted if not graph.is_decoder(name))
    by_layer: dict[int, list[str]] = {}
    for name in sorted(wanted):
        if (layer := graph.layer_of(name)) is not None:
            by_layer.setdefault(layer, []).append(name)
    lowest = 0 if outer and differentiated else min(by_layer, default=graph.num_layers)
    with requiring_grad((), freeze=execution.model):
        walk = GradientWalk(
            execution, calibration,
            squares=Signal.GRAD_SQ in needs, outer=outer if differentiated else (), exact=bool(differentiated),
        )  # fmt: skip
        walk.forward()
        walk.backward_head()
        for number in execution.progress.track(range(graph.num_layers - 1, lowest - 1, -1), "Measuring importance"):
            names = by_layer.get(number, [])
            with execution.weights.layer(number):
                reduced = None if reduce is None else reduce(names)
                sums = walk.backward_layer(number, differentiated, reduced)
                products = {} if reduced is None else reduced.statistics(execution.ranks)
                for name in names:
                    measured = replace(forward.get(name, NOTHING), products=products.get(name))
                    yield from make(name, measured, sums.pop(name, None))
        if outer:
            with execution.weights.outside():
                sums = walk.backward_outer(outer) if differentiated else {}
                for name in outer:
                    yield from make(name, NOTHING, sums.pop(name, None))


def _signals(
    model: PreTrainedModel,
    needs: Collection[Signal],
    seed: int,
    by_matrix: bool,
    name: str,
    measured: Measured = NOTHING,
    sums: GradientSums | None = None,
) -> Named:
    """The signals of one parameter; ``by_matrix``: of each matrix of a stack in turn, so that one is in float32 at a
    time. Raises `ModelError` when its values are not finite."""
    parameter, inputs, products = model.get_parameter(name).detach(), measured.inputs, measured.products
    if not bool(torch.isfinite(parameter.sum(dtype=torch.float32))):
        raise ModelError(f"parameter '{name}' holds NaN or infinite values; the checkpoint is damaged")
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    grad = sums.grad if sums is not None and Signal.GRAD in needs else None
    grad_sq = sums.grad_sq if sums is not None and Signal.GRAD_SQ in needs else None
    dtype = torch.float32 if Signal.WEIGHT in needs else parameter.dtype
    if not (by_matrix and parameter.dim() == 3):
        grad = None if grad is None else grad.float()
        yield name, ParameterSignals(parameter.to(dtype), grad, grad_sq, generator, inputs, products)
        return
    for number in range(len(parameter)):
        matrix = slice(number, number + 1)
        yield (
            name,
            ParameterSignals(
                parameter[matrix].to(dtype),
                None if grad is None else grad[matrix].float(),
                None if grad_sq is None else grad_sq[matrix],
                generator,
                inputs and inputs.of_matrix(number),
                products and products.of_matrix(number),
                number,
            ),
        )
