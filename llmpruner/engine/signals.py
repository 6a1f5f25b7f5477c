"""The values that criteria score from: what is measured of each parameter, product and layer. Imports no torch.

Shapes: ``rows`` is the number of calibration tokens that a weight is multiplied with in one micro-batch, ``d_in`` and
``d_out`` are the widths of a weight matrix, ``experts`` the number of matrices in a stacked parameter (one per expert).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError
from .position import Position

if TYPE_CHECKING:
    import torch


class Signal(str, Enum):
    """What a criterion can ask for. Everything but `WEIGHT` needs a calibration set."""

    WEIGHT = "weight"
    """The parameter itself: `ParameterSignals.weight`."""
    GRAD = "grad"
    """Gradient of the mean next-token loss over the calibration set: `ParameterSignals.grad`."""
    GRAD_SQ = "grad_sq"
    """Mean over samples of the squared gradient of one sample's loss, the diagonal of the empirical Fisher information:
    `ParameterSignals.grad_sq`."""
    INPUT_STATS = "input_stats"
    """Mean and second moment of the inputs of a weight matrix: `ParameterSignals.inputs`."""
    GRAM = "gram"
    """Mean outer product of the inputs of a weight matrix, with the statistics above: `InputStats.gram`."""
    PRODUCT = "product"
    """Sums that `ImportanceCriterion.measure` makes of every product with the weight: `ParameterSignals.products`."""
    PRODUCT_GRAD = "product_grad"
    """The same sums, where `ImportanceCriterion.measure` also sees the gradients at the product."""
    STREAM = "stream"
    """The residual stream before and after each layer; seen by `ImportanceCriterion.score_layers` alone."""
    STREAM_BLOCKS = "stream_blocks"
    """The residual stream before and after each block of consecutive layers, of every length; as `STREAM`."""


@dataclass(frozen=True, slots=True)
class InputStats:
    """Statistics of the inputs of a weight matrix, averaged over all calibration tokens; a token that is not routed to
    an expert counts as a zero for it.

    ``mean`` and ``second_moment`` are float32 and broadcast against the weight: (1, d_in) for a linear layer,
    (d_in, 1) for a transposed one, (experts, 1, d_in) or (experts, d_in, 1) for a stack.
    """

    mean: torch.Tensor
    """E[x]."""
    second_moment: torch.Tensor
    """E[x²], the mean square."""
    axis: int
    """The axis of the weight that the inputs run along."""
    gram: torch.Tensor | None = None
    """E[xxᵀ] in float32, (d_in, d_in) or (experts, d_in, d_in); None unless `Signal.GRAM` was asked for."""
    routed: torch.Tensor | None = None
    """For a stack: how many calibration tokens were routed to each expert, (experts,), int64. None for one matrix."""
    all_tokens: bool = True
    """Whether every calibration token was multiplied with the weight. False for experts that not all tokens go to."""

    @property
    def variance(self) -> torch.Tensor:
        """E[x²] − E[x]², shaped like ``mean``; never negative."""
        return (self.second_moment - self.mean.square()).clamp_min(0)


@dataclass(frozen=True, slots=True)
class StreamStats:
    """The residual stream before and after blocks of consecutive layers, averaged over all calibration tokens.

    Both tensors are float64 of shape (lengths, layers): element [n − 1, i] compares the hidden states of a token before
    layer i with those after layer i + n − 1. Blocks that reach beyond the last layer are NaN. ``lengths`` is 1 for
    `Signal.STREAM`, and the number of layers for `Signal.STREAM_BLOCKS`.
    """

    cosine: torch.Tensor
    """Mean cosine similarity."""
    angle: torch.Tensor
    """Mean angle, in units of π."""


@dataclass(frozen=True, slots=True)
class Product:
    """One product of calibration tokens with a weight matrix in one micro-batch: ``outputs = inputs @ weight.T +
    bias``, with the bias of a linear layer (or GPT-2's Conv1D) or of an expert, where it has one.

    ``inputs`` (rows, d_in), ``outputs`` (rows, d_out) and gradients are float32. They are the walk's own tensors: copy
    what is to outlive the call, and change nothing in place. Of an expert, rows are the tokens routed to it (of a model
    that computes every expert on all tokens, such as Llama 4, all tokens, with zeros for those not routed to it).
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    weight: torch.Tensor
    """(d_out, d_in), in the model's dtype; of a stack, the matrix of this expert."""
    position: Position
    expert: int | None
    """Number of the expert in a stacked parameter; None where the parameter is one matrix."""
    num_samples: int
    """How many samples the calibration set has."""
    output_grads: torch.Tensor | None = None
    """Gradient, with respect to ``outputs``, of the mean next-token loss of the sample that each row belongs to, (rows,
    d_out); None unless `Signal.PRODUCT_GRAD` was asked for."""
    row_samples: torch.Tensor | None = None
    """`samples`, or None where they are not known."""
    row_gates: torch.Tensor | None = None
    """`gates` of an expert, or None where they are not known."""

    @property
    def input_grads(self) -> torch.Tensor:
        """The gradient that reaches ``inputs`` through this product, (rows, d_in): ``output_grads @ weight``."""
        if self.output_grads is None:
            raise ValueError("gradients at a product need Signal.PRODUCT_GRAD")
        return self.output_grads @ self.weight.float()

    @property
    def samples(self) -> torch.Tensor:
        """Number of the calibration sample of each row, in the order of calibration, (rows,), int64.

        Raises `UnsupportedModelError` where rows cannot be assigned to tokens (see `gates`).
        """
        return _known(self.row_samples, "which calibration token each row of an input belongs to")

    @property
    def gates(self) -> torch.Tensor:
        """The weight with which the router adds this expert's output for each row's token, as the model applies it
        (renormalised over the chosen experts if the model does so), (rows,), float32. Ones where ``expert`` is None.

        Raises `UnsupportedModelError` where the module that holds the experts is not called with hidden states, the
        chosen experts and their weights, as in transformers.
        """
        if self.expert is None:
            return self.inputs.new_ones(len(self.inputs))
        return _known(self.row_gates, "the router's weight of each token of an expert")


@dataclass(frozen=True, slots=True)
class ProductStats:
    """What `ImportanceCriterion.measure` returned, added up in float64 over all products with one weight.

    ``sums``: name → sum, of the shape that was returned; for a stack with a leading axis of experts, with zeros for
    experts that no token was routed to. ``axis``: the axis of the weight that the inputs run along.
    """

    sums: Mapping[str, torch.Tensor]
    axis: int


@dataclass(frozen=True, slots=True)
class ParameterSignals:
    """One parameter as a criterion sees it. ``weight`` and gradients have its shape, in float32; signals that the
    criterion did not ask for are None."""

    weight: torch.Tensor
    grad: torch.Tensor | None
    grad_sq: torch.Tensor | None
    generator: torch.Generator
    """Seeded by the run's seed and the parameter's name; for criteria that draw random numbers."""
    inputs: InputStats | None = None
    """None also for a parameter of the decoder that is no matrix in a product, and for all outside the decoder."""
    products: ProductStats | None = None
    """None also where ``inputs`` is."""
    position: Position = field(default_factory=Position)

    def over_inputs(self, values: torch.Tensor) -> torch.Tensor:
        """A saliency of the weight's shape from one value per input channel: each value is divided equally among the
        weights that read the channel, so that their saliencies add up to it.

        ``values``: (d_in,), or (experts, d_in) for a stack. Needs ``inputs`` or ``products``.
        """
        measured = self.inputs or self.products
        if measured is None:
            raise ValueError("without a product, a weight has no input channels")
        shape = [1] * self.weight.dim()
        shape[measured.axis] = self.weight.shape[measured.axis]
        if self.weight.dim() > 2:
            shape[0] = self.weight.shape[0]
        return (values.reshape(shape) / (self.weight.numel() / values.numel())).expand_as(self.weight)


def _known(values: torch.Tensor | None, what: str) -> torch.Tensor:
    if values is None:
        raise UnsupportedModelError(f"{what} cannot be told for this model; choose another criterion")
    return values
