"""What criteria read, measured layer by layer: signals of parameters, changes of hidden states, use of tokens."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Set
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import nan, pi
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ..errors import ModelError
from ..models.devices import doubled, multiplies_bfloat16_fast, of_sums
from ..models.numbers import with_fast_products
from ..structure.coupling import MLP
from .execution import Execution
from .gradients import GradientSums, GradientWalk, requiring_grad
from .products import Measure, ReduceProducts, WatchedProduct, WatchProducts
from .ranks import Ranks
from .signals import GRADIENTS, InputStats, ParameterSignals, ProductStats, Signal, StreamStats, TokenStats
from .walk import CalibrationSet, ForwardWalk

PREDICTED = 8192
"""Tokens of a text whose next tokens are predicted for `TokenStats`: a pass over the whole model, unlike counting."""
_ROWS = 4096
"""Rows of the head at a time, for `ParameterSignals.logit_peaks`."""
Named = Iterator[tuple[str, ParameterSignals]]
Statistics = tuple[InputStats | None, ProductStats | None]
"""Of one weight from a forward walk; None where they were not requested."""


@dataclass(frozen=True)
class SignalWalk:
    """Iterates over the parameters ``names`` with their signals in ``needs``. Keep no reference to what is yielded, to
    save memory. ``reads``: of `kinds_read`. ``measure``: `ImportanceCriterion.measure`. ``by_matrix``: stacks are
    yielded matrix by matrix. Raises `ModelError` for values that are not finite."""

    execution: Execution
    reads: Mapping[str, frozenset[str]]
    names: Collection[str]
    needs: Set[Signal]
    calibration: CalibrationSet | None
    seed: int
    measure: Measure
    by_matrix: bool = False

    def __iter__(self) -> Named:
        if self.needs & GRADIENTS:
            yield from self._of_gradients(dict(self.forward()))
            return
        rest = set(self.names)
        for name, statistics in self.forward():
            rest.discard(name)
            yield from self._signals(name, statistics)
        # Nothing was measured of the others.
        outer, by_layer = self._by_layer(rest)
        for part, inside in ((None, outer), *enumerate(by_layer)):
            if inside:
                with self.execution.weights.part(part):
                    for name in inside:
                        yield from self._signals(name)

    @torch.no_grad()
    def forward(self) -> Iterator[tuple[str, Statistics]]:
        """Statistics of the parameters that decoder layers use in matrix products, while each is in memory."""
        gram = Signal.GRAM in self.needs
        with_products = Signal.PRODUCT in self.needs and Signal.PRODUCT_GRAD not in self.needs
        inputs = gram or Signal.INPUT_STATS in self.needs
        if not (inputs or with_products):
            return
        walk, states = ForwardWalk.over(self.execution, self._text)
        model, weights, ranks = self.execution.model, self.execution.weights, self.execution.ranks
        _, by_layer = self._by_layer(self.names)
        count = max((number + 1 for number, inside in enumerate(by_layer) if inside), default=0)
        for number in self.execution.progress.track(range(count), "Measuring inputs"):
            inside, sums = by_layer[number], _InputSums(model, gram=gram)
            with weights.layer(number):
                reduced = self._products(inside) if with_products else None
                for position in range(len(walk.calls)):
                    watching = nullcontext() if reduced is None else reduced.watching()
                    with watching, WatchProducts(model, inside if inputs else (), sums.add):
                        states[position] = walk.run(number, position, states)
                of_inputs = sums.statistics(self._text.input_ids.numel(), ranks)
                of_products = {} if reduced is None else reduced.statistics(ranks)
                for name in {**of_inputs, **of_products}:
                    yield name, (of_inputs.get(name), of_products.get(name))

    def _of_gradients(self, forward: Mapping[str, Statistics]) -> Named:
        """From a backward pass, the last layer first. ``forward``: what the forward pass measured."""
        execution = self.execution
        differentiated = bool({Signal.GRAD, Signal.GRAD_SQ} & self.needs)
        outer, by_layer = self._by_layer(self.names)
        count = len(by_layer)
        lowest = 0 if outer and differentiated else min((n for n in range(count) if by_layer[n]), default=count)
        with requiring_grad(execution.model.parameters(), required=False):
            walk = GradientWalk(execution, self._text, self.needs, outer if differentiated else ())
            walk.forward()
            for number in execution.progress.track(range(count - 1, lowest - 1, -1), "Measuring importance"):
                inside = by_layer[number]
                with execution.weights.layer(number):
                    reduced = self._products(inside) if Signal.PRODUCT_GRAD in self.needs else None
                    sums = walk.backward_layer(number, inside if differentiated else (), reduced)
                    of_products = {} if reduced is None else reduced.statistics(execution.ranks)
                    for name in inside:
                        inputs, products = forward.get(name, (None, None))
                        measured = inputs, of_products.get(name, products)
                        yield from self._signals(name, measured, sums.pop(name, None))
            if outer:
                with execution.weights.outside():
                    sums = walk.backward_outer() if differentiated else {}
                    for name in outer:
                        yield from self._signals(name, sums=sums.pop(name, None))

    def _signals(self, name: str, measured: Statistics = (None, None), sums: GradientSums | None = None) -> Named:
        """The signals of one parameter; ``by_matrix``: of each matrix of a stack in turn, one in float32 at a time."""
        parameter, (inputs, products) = self.execution.model.get_parameter(name).detach(), measured
        if not bool(torch.isfinite(parameter.sum(dtype=torch.float32))):
            raise ModelError(f"parameter '{name}' holds NaN or infinite values; the checkpoint is damaged")
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        grad = sums.grad if sums is not None and Signal.GRAD in self.needs else None
        grad_sq = None if sums is None else sums.grad_sq
        dtype, where = torch.float32 if Signal.WEIGHT in self.needs else parameter.dtype, of_sums(parameter.device)
        for number in range(len(parameter)) if self.by_matrix and parameter.dim() == 3 else (None,):
            part = ... if number is None else slice(number, number + 1)
            signals = ParameterSignals(
                parameter[part].to(where, dtype),
                None if grad is None else grad[part].to(where, torch.float32),
                None if grad_sq is None else grad_sq[part].to(where),
                generator,
                inputs if inputs is None or number is None else inputs.of_matrix(number),
                products if products is None or number is None else products.of_matrix(number),
                self._logit_peaks(name, products),
                number,
            )
            yield name, signals

    def _logit_peaks(self, name: str, products: ProductStats | None) -> torch.Tensor | None:
        """See `ParameterSignals.logit_peaks`."""
        execution, parameter = self.execution, self.execution.model.get_parameter(name).detach()
        last = execution.weights.number(name) == len(execution.layers) - 1
        head = execution.model.get_output_embeddings()
        if Signal.LOGIT_PEAKS not in self.needs or not last or head is None or self.reads.get(name) != frozenset({MLP}):
            return None
        if products is None or parameter.dim() != 2:
            return None
        weight_OI = parameter if products.axis == 1 else parameter.T
        with torch.no_grad(), execution.weights.outside():
            rows_VO = head.weight.detach()
            if rows_VO.shape[1] != len(weight_OI):
                return None
            fast = multiplies_bfloat16_fast(rows_VO.device.type)
            mean, dtype = rows_VO.mean(0, dtype=torch.float32), torch.bfloat16 if fast else torch.float32
            peaks = [
                ((part - mean).to(dtype) @ weight_OI.to(dtype)).abs().amax(0) for part in torch.split(rows_VO, _ROWS)
            ]
            return torch.stack(peaks).amax(0).float()

    def _products(self, names: Collection[str]) -> ReduceProducts:
        model, samples = self.execution.model, len(self._text.input_ids)
        return ReduceProducts(model, names, self.reads, self.measure, samples, Signal.PRODUCT_GRAD in self.needs)

    @property
    def _text(self) -> CalibrationSet:
        assert self.calibration is not None, "all signals but weights are measured on text"
        return self.calibration

    def _by_layer(self, names: Collection[str]) -> tuple[list[str], list[list[str]]]:
        """The parameters outside the decoder layers, and those of each layer, sorted."""
        parts: defaultdict[int | None, list[str]] = defaultdict(list)
        for name in sorted(names):
            parts[self.execution.weights.number(name)].append(name)
        return parts[None], [parts[number] for number in range(len(self.execution.layers))]


class _InputSums:
    """Sums over tokens: of inputs and of their squares, float64; with ``gram`` of outer products, float32, lower."""

    def __init__(self, model: PreTrainedModel, *, gram: bool) -> None:
        self._model, self._gram = model, gram
        self._axes: dict[str, int] = {}
        self._sums: dict[str, list[torch.Tensor]] = {}

    def _of(self, name: str, axis: int) -> list[torch.Tensor]:
        if name not in self._sums:
            weight = self._model.get_parameter(name)
            stack, width = weight.shape[:-2], weight.shape[axis]
            shape = [*stack, 1, 1]
            shape[axis] = width
            sums = [torch.zeros(shape, dtype=torch.float64, device=of_sums(weight.device)) for _ in range(2)]
            outer = [torch.zeros(*stack, width, width, device=weight.device)] if self._gram else []
            self._axes[name], self._sums[name] = axis, sums + outer
        return self._sums[name]

    def add(self, product: WatchedProduct) -> None:
        total, square, *outer = self._of(product.parameter, product.axis)
        matrix, inputs = ... if product.slot is None else product.slot, product.inputs.float()
        # The tokens of a micro-batch in float32, by torch's pairwise sums: casting all inputs would take far longer.
        total[matrix].view(-1).add_(inputs.sum(0).to(total.device))
        square[matrix].view(-1).add_(inputs.square().sum(0).to(total.device))
        for lower in outer:
            add_gram(lower[matrix], inputs)

    def statistics(self, tokens: int, ranks: Ranks) -> dict[str, InputStats]:
        """Means over ``tokens`` calibration tokens, for every weight that was used. Called by all ``ranks``."""
        axes = ranks.merged(self._axes)
        every = {name: self._of(name, axis) for name, axis in axes.items()}
        ranks.sum_(tensor for sums in every.values() for tensor in sums)
        statistics = {}
        for name, (total, square, *outer) in every.items():
            mean, second_moment = ((sums / tokens).float() for sums in (total, square))
            if not bool(second_moment.isfinite().all()):
                dtype = str(self._model.dtype).removeprefix("torch.")
                raise ModelError(f"the inputs of '{name}' are not finite numbers: activations overflow in {dtype}")
            gram = ((outer[0].tril() + outer[0].tril(-1).mT) / tokens).to(mean.device) if outer else None
            statistics[name] = InputStats(mean, second_moment, axes[name], gram)
        return statistics


def add_gram(lower_II: torch.Tensor, inputs_NI: torch.Tensor) -> None:
    """Add XᵀX, in the dtype of X, to the lower triangle of ``lower_II``; what is above the diagonal is undefined."""
    width = inputs_NI.shape[1]
    step = max(1, -(-width // 4))  # more blocks of columns save little more
    for start in range(0, width, step):
        end = min(start + step, width)
        add_product(lower_II[start:, start:end], inputs_NI[:, start:].T, inputs_NI[:, start:end])


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left · right, in their dtype, to ``total``; also under autocast, which would compute ``@`` in bfloat16."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


@torch.no_grad()
def stream_statistics(
    execution: Execution, calibration: CalibrationSet, length: int = 1, removable: frozenset[int] | None = None
) -> StreamStats:
    """Compare the hidden states before and after blocks of ``length`` layers. ``removable``: as in `StreamStats`."""
    walk, embedded = ForwardWalk.over(execution, calibration)
    count = len(walk.layers)
    cosine, angle = torch.full((2, count), nan, dtype=torch.float64)
    before = [embedded]
    for number in execution.progress.track(range(count), "Measuring layers"):
        # One value for each token of the calibration set, in order; each process fills in its own.
        cosines = torch.zeros(calibration.input_ids.shape, dtype=torch.float64)
        start = number + 1 - length
        # What was before a block gives way to what is after it.
        after = before[0] if start >= 0 else before[-1].empty()
        with execution.weights.layer(number):
            for position, first in enumerate(walk.firsts):
                states = walk.run(number, position, before[-1])
                if start >= 0:
                    similar = torch.cosine_similarity(before[0][position], states, dim=-1)
                    # Some models put prompts of their own before the text (CPM-Ant).
                    cosines[first : first + len(similar)] = similar[:, -cosines.shape[1] :]
                    after[position] = states
                else:
                    after.append(states)
        if start >= 0:
            execution.ranks.sum_([cosines])
            cosines.clamp_(-1, 1)
            cosine[start], angle[start] = float(cosines.mean()), float(cosines.arccos().mean()) / pi
        before = [*before, after][-length:]
    return StreamStats(cosine, angle, length, removable)


@torch.no_grad()
def token_statistics(execution: Execution, calibration: CalibrationSet, tokenizer: Any | None) -> TokenStats:
    """Count the tokens of the calibration text, and sum the probabilities of next tokens on its first `PREDICTED`."""
    model = execution.model
    rows = model.get_input_embeddings().weight.shape[0]
    counts = torch.bincount(calibration.input_ids.flatten(), minlength=rows)
    expected, predicted = torch.zeros(rows, dtype=torch.float64), 0
    with execution.weights.outside():
        ids = calibration.first(PREDICTED).input_ids.to(model.device)
        for sample in execution.progress.track(torch.split(ids, 1), "Predicting tokens"):
            logits = with_fast_products(model, partial(model, input_ids=sample, use_cache=False)).logits
            expected += doubled(logits[0].float().softmax(-1).sum(0)).cpu()
            predicted += sample.numel()
    return TokenStats(counts, expected, predicted, tokenizer)


def divergence(reference_BTV: torch.Tensor, logits_BTV: torch.Tensor) -> float:
    """Sum of KL(reference ‖ logits) over all positions but the last of each sequence, in nats."""
    pairs = zip(reference_BTV, logits_BTV, strict=True)
    return sum(float(doubled(divergences(reference[:-1], logits[:-1])).sum()) for reference, logits in pairs)


def divergences(reference_TV: torch.Tensor, logits_TV: torch.Tensor) -> torch.Tensor:
    """KL(reference ‖ logits) at each position (T,), in nats, float32."""
    log_p, log_q = reference_TV.float().log_softmax(-1), logits_TV.float().to(reference_TV.device).log_softmax(-1)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
