"""The signals of parameters, layer by layer: from their weights alone, from a forward pass, or from gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..errors import ModelError
from .gradients import GradientSums, GradientWalk, requiring_grad
from .products import Measure, ReduceProducts
from .signals import GRADIENTS, ParameterSignals, Signal, kinds_read
from .statistics import Statistics, forward_statistics

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
    samples, backward, reads = len(calibration.input_ids), Signal.PRODUCT_GRAD in needed, kinds_read(graph)

    def reduce(names: Collection[str]) -> ReduceProducts:
        assert measure is not None, "statistics of products need a function that measures them"
        return ReduceProducts(execution.model, names, reads, measure, samples, gradients=backward)

    forward: Iterable[tuple[str, Statistics]] = ()
    inputs, gram = bool(needed & {Signal.INPUT_STATS, Signal.GRAM}), Signal.GRAM in needed
    forward_reduce = reduce if Signal.PRODUCT in needed and not backward else None
    if inputs or forward_reduce:
        forward = forward_statistics(execution, wanted, calibration, inputs=inputs, gram=gram, reduce=forward_reduce)
    if needed & GRADIENTS:
        backward_reduce = reduce if backward else None
        yield from _of_gradients(execution, graph, wanted, needed, calibration, dict(forward), backward_reduce, make)
        return
    rest = set(wanted)
    for name, measured in forward:
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
    forward: Mapping[str, Statistics],
    reduce: Callable[[Collection[str]], ReduceProducts] | None,
    make: Callable[[str, Statistics, GradientSums | None], Named],
) -> Named:
    """From a backward pass, the last layer first. ``forward``: what the forward pass measured."""
    differentiated = bool({Signal.GRAD, Signal.GRAD_SQ} & needs)
    outer: list[str] = []
    by_layer: dict[int, list[str]] = {}
    for name in sorted(wanted):
        layer = graph.layer_of(name)
        (outer if layer is None else by_layer.setdefault(layer, [])).append(name)
    lowest = 0 if outer and differentiated else min(by_layer, default=graph.num_layers)
    with requiring_grad(execution.model.parameters(), required=False):
        walk = GradientWalk(
            execution, calibration,
            squares=Signal.GRAD_SQ in needs, outer=outer if differentiated else (), exact=differentiated,
        )  # fmt: skip
        walk.forward()
        walk.backward_head()
        for number in execution.progress.track(range(graph.num_layers - 1, lowest - 1, -1), "Measuring importance"):
            names = by_layer.get(number, [])
            with execution.weights.layer(number):
                reduced = None if reduce is None else reduce(names)
                sums = walk.backward_layer(number, names if differentiated else (), reduced)
                of_products = {} if reduced is None else reduced.statistics(execution.ranks)
                for name in names:
                    inputs, products = forward.get(name, (None, None))
                    yield from make(name, (inputs, of_products.get(name, products)), sums.pop(name, None))
        if outer:
            with execution.weights.outside():
                sums = walk.backward_outer() if differentiated else {}
                for name in outer:
                    yield from make(name, (None, None), sums.pop(name, None))


def _signals(
    model: PreTrainedModel,
    needs: Collection[Signal],
    seed: int,
    by_matrix: bool,
    name: str,
    measured: Statistics = (None, None),
    sums: GradientSums | None = None,
) -> Named:
    """The signals of one parameter; ``by_matrix``: of each matrix of a stack in turn, so that one is in float32 at a
    time. Raises `ModelError` when its values are not finite."""
    parameter, (inputs, products) = model.get_parameter(name).detach(), measured
    if not bool(torch.isfinite(parameter.sum(dtype=torch.float32))):
        raise ModelError(f"parameter '{name}' holds NaN or infinite values; the checkpoint is damaged")
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    grad = sums.grad if sums is not None and Signal.GRAD in needs else None
    grad_sq = sums.grad_sq if sums is not None and Signal.GRAD_SQ in needs else None
    dtype = torch.float32 if Signal.WEIGHT in needs else parameter.dtype
    for number in range(len(parameter)) if by_matrix and parameter.dim() == 3 else (None,):
        part = ... if number is None else slice(number, number + 1)
        yield (
            name,
            ParameterSignals(
                parameter[part].to(dtype),
                None if grad is None else grad[part].float(),
                None if grad_sq is None else grad_sq[part],
                generator,
                inputs if inputs is None or number is None else inputs.of_matrix(number),
                products if products is None or number is None else products.of_matrix(number),
                number,
            ),
        )
