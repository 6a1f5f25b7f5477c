"""The measured values that criteria compute scores from, of parameters, products and layers. Imports no torch.

Shapes: ``rows`` is the number of calibration tokens that a weight is multiplied with in one micro-batch, ``d_in`` and
``d_out`` are the widths of a weight matrix, ``experts`` the number of matrices in a stacked parameter (one per expert).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from ..structure.coupling import CouplingGraph, Role

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class UnitAxis:
    """One axis of a parameter whose indices belong to the units of a coupled group."""

    kind: str
    """Kind of the units: ``"mlp"``, ``"attention"``, ``"hidden"``, ``"expert"``, ``"layer"`` …"""
    role: Role | None
    """Role of the span; None where a unit is a layer, which owns the whole parameter."""
    axis: int
    """The axis of the parameter; 0 where a unit is a layer."""
    reads: frozenset[str]
    """As `Product.reads`, of the parameter."""


def kinds_read(graph: CouplingGraph) -> dict[str, frozenset[str]]:
    """Name of a stored parameter → the kinds of the units whose activations it is multiplied with, scored or not."""
    reads: dict[str, set[str]] = {name: set() for name in graph.shapes if name not in graph.ties}
    for group in graph.groups:
        for span in group.spans_with(Role.CONSUMES):
            reads[graph.ties.get(span.parameter, span.parameter)].add(group.kind)
    return {name: frozenset(kinds) for name, kinds in reads.items()}


class Signal(str, Enum):
    """The values that a criterion can need. All but `WEIGHT` need a calibration set."""

    WEIGHT = "weight"
    """The parameter itself: `ParameterSignals.weight`."""
    GRAD = "grad"
    """Gradient of the mean next-token loss over the calibration set: `ParameterSignals.grad`."""
    GRAD_SQ = "grad_sq"
    """Mean over samples of the squared gradient of each one's loss (empirical Fisher): `ParameterSignals.grad_sq`."""
    INPUT_STATS = "input_stats"
    """Mean and second moment of the inputs of a weight matrix: `ParameterSignals.inputs`."""
    GRAM = "gram"
    """Mean outer product of the inputs of a weight matrix, with the statistics above: `InputStats.gram`."""
    PRODUCT = "product"
    """Sums of what `ImportanceCriterion.measure` returns for every product: `ParameterSignals.products`."""
    PRODUCT_GRAD = "product_grad"
    """As `PRODUCT`, with the gradients of each product in `Product.output_grads`; without those that have none."""
    LOGIT_PEAKS = "logit_peaks"
    """With `PRODUCT` or `PRODUCT_GRAD`, the largest change of a single logit by each channel of the last layer's MLP:
    `ParameterSignals.logit_peaks`."""
    STREAM = "stream"
    """Hidden states before and after each layer, compared; for `ImportanceCriterion.score_layers` alone."""
    STREAM_BLOCKS = "stream_blocks"
    """As `STREAM`, for blocks of as many consecutive layers as the plan removes."""
    TOKENS = "tokens"
    """How often tokens are written and expected; for `ImportanceCriterion.score_tokens` alone."""


GRADIENTS = frozenset({Signal.GRAD, Signal.GRAD_SQ, Signal.PRODUCT_GRAD})
"""Those that need a backward pass."""


@dataclass(frozen=True, slots=True)
class InputStats:
    """Statistics of the inputs of a weight matrix, averaged over all calibration tokens; a token that is not routed to
    an expert counts as a zero for it. ``mean`` and ``second_moment`` are float32 and broadcast against the weight:
    (1, d_in) for a linear layer, (d_in, 1) for a transposed one, with a leading axis of experts for a stack."""

    mean: torch.Tensor
    """E[x]."""
    second_moment: torch.Tensor
    """E[x²], the mean square."""
    axis: int
    """The input axis of the weight."""
    gram: torch.Tensor | None = None
    """E[xxᵀ] in float32, (d_in, d_in) or (experts, d_in, d_in); None unless `Signal.GRAM` was asked for."""

    def of_matrix(self, number: int) -> InputStats:
        """Those of one matrix of a stack, with a first axis of length one."""
        part = slice(number, number + 1)
        gram = None if self.gram is None else self.gram[part]
        return replace(self, mean=self.mean[part], second_moment=self.second_moment[part], gram=gram)

    @property
    def variance(self) -> torch.Tensor:
        """E[x²] − E[x]², shaped like ``mean``; never negative."""
        return (self.second_moment - self.mean.square()).clamp_min(0)


@dataclass(frozen=True, slots=True)
class TokenStats:
    """How often tokens are used. ``counts``: how often each is written in the calibration text, (V,), int64.
    ``expected``: the sum of its probabilities as the next token at ``predicted`` positions of the text, (V,), float64.
    ``tokenizer``: None for a model without one, whose tokens can be scored but not removed."""

    counts: torch.Tensor
    expected: torch.Tensor
    predicted: int
    tokenizer: Any | None


@dataclass(frozen=True, slots=True)
class StreamStats:
    """Comparison of the hidden states before and after blocks of ``length`` consecutive layers, averaged over all
    calibration tokens: of one for `Signal.STREAM`, of about as many as will go for `Signal.STREAM_BLOCKS`. Tensors are
    float64 (layers,): element i is of the block that begins at layer i, NaN where it would end after the last one."""

    cosine: torch.Tensor
    """Mean cosine similarity."""
    angle: torch.Tensor
    """Mean angle, in units of π."""
    length: int = 1
    removable: frozenset[int] | None = None
    """The layers that may be removed; None: all."""


@dataclass(frozen=True, slots=True)
class Product:
    """One product of a micro-batch with a weight matrix: ``outputs = inputs @ weight.T + bias``, where there is one.

    ``inputs`` (rows, d_in), ``outputs`` (rows, d_out) and gradients are float32. They may share memory with the model:
    copy what is to be kept after the call, and change nothing in place. For an expert, rows are the tokens routed to it
    (where every expert is computed on all tokens, as in Llama 4, all tokens, with zeros for those not routed to it).
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    weight: torch.Tensor
    """(d_out, d_in), in the model's dtype; for a stack, the matrix of this expert."""
    reads: frozenset[str]
    """Kinds of the units whose activations the inputs are: ``{"mlp"}`` for a down projection."""
    expert: int | None
    """Number of the expert in a stacked parameter; None where the parameter is one matrix."""
    num_samples: int
    """Number of samples in the calibration set."""
    output_grads: torch.Tensor | None = None
    """Gradient of the mean next-token loss of each row's sample with respect to ``outputs``, (rows, d_out); None unless
    `Signal.PRODUCT_GRAD` was asked for."""
    row_gates: torch.Tensor | None = None
    """As `gates`, for an expert; None where unknown."""
    row_gate_shares: torch.Tensor | None = None
    """As `gate_shares`, for an expert; None where unknown."""
    in_bfloat16: bool = False
    """Whether ``outputs`` were computed in bfloat16 on a device that is faster so; `input_grads` are too then."""

    @property
    def input_grads(self) -> torch.Tensor:
        """Gradient with respect to ``inputs`` through this product alone, (rows, d_in), float32."""
        if self.output_grads is None:
            raise ValueError("gradients at a product need Signal.PRODUCT_GRAD")
        if self.in_bfloat16:
            return (self.output_grads.bfloat16() @ self.weight.bfloat16()).float()
        return self.output_grads @ self.weight.float()

    @property
    def gates(self) -> torch.Tensor:
        """Router weight of this expert for each row's token, as the model applies it, (rows,), float32; ones where
        ``expert`` is None. Raises `UnsupportedModelError` where experts are not called as in transformers."""
        return self._of_rows(self.row_gates)

    @property
    def gate_shares(self) -> torch.Tensor:
        """`gates` divided by their sum over the experts chosen for the token; zeros where all are zero."""
        return self._of_rows(self.row_gate_shares)

    def _of_rows(self, known: torch.Tensor | None) -> torch.Tensor:
        if self.expert is None:
            return self.inputs.new_ones(len(self.inputs))
        if known is None:
            raise UnsupportedModelError(
                "the router weight of each token of an expert is not known for this model; choose another criterion"
            )
        return known


@dataclass(frozen=True, slots=True)
class ProductStats:
    """Results of `ImportanceCriterion.measure`, summed in float64 over all products with one weight, by name; for a
    stack with a leading axis of experts, zeros for those without tokens. ``axis``: the input axis of the weight."""

    sums: Mapping[str, torch.Tensor]
    axis: int

    def of_matrix(self, number: int) -> ProductStats:
        """Those of one matrix of a stack, with a first axis of length one."""
        return replace(self, sums={name: tensor[number : number + 1] for name, tensor in self.sums.items()})


@dataclass(frozen=True, slots=True)
class ParameterSignals:
    """The signals of one parameter. ``weight`` and gradients have its shape, in float32; signals that the criterion did
    not ask for are None, and ``weight`` is in the model's dtype without `Signal.WEIGHT`."""

    weight: torch.Tensor
    grad: torch.Tensor | None
    grad_sq: torch.Tensor | None
    generator: torch.Generator
    """For criteria that draw random numbers; seeded by the run's seed and the parameter's name."""
    inputs: InputStats | None = None
    """None also for parameters that are not used in a matrix product, and for those outside the decoder layers."""
    products: ProductStats | None = None
    """None also for the same parameters as ``inputs``."""
    logit_peaks: torch.Tensor | None = None
    """max_v |h_v·W_:j| over the rows h_v of the head, less their mean, (d_in,), float32: how much a channel that is 1
    adds to a single logit, but for the last norm. None but for the weight that reads the last layer's MLP channels."""
    matrix: int | None = None
    """The number of a matrix in a stack, for a criterion that gets them one at a time
    (`ImportanceCriterion.by_matrix`); all tensors have a first axis of length one then."""

    def over_inputs(self, values: torch.Tensor) -> torch.Tensor:
        """A saliency of the weight's shape from one value per input channel, shared equally by the channel's weights.
        ``values``: (d_in,), or (experts, d_in) for a stack. Raises `ValueError` without ``inputs`` or ``products``."""
        measured = self.inputs or self.products
        if measured is None:
            raise ValueError("the input axis of this parameter is unknown, as it is not used in a matrix product")
        shape = [1] * self.weight.dim()
        shape[measured.axis] = self.weight.shape[measured.axis]
        if self.weight.dim() > 2:
            shape[0] = self.weight.shape[0]
        return (values.reshape(shape) / (self.weight.numel() / values.numel())).expand_as(self.weight)
