"""Sizes of a model and of the work on it, by which a forecast computes memory and time."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from ..engine.executor import TOKENS_AT_ONCE, TOKENS_WITH_GRADIENTS
from ..engine.signals import Signal
from ..pruning.compensation.consumers import Consumer, consumers_of, intact_readers
from .forecast import Residency
from .layer_sample import layer_parameters
from .work import Work

if TYPE_CHECKING:
    import torch

    from ..models.model import Structure

F32, F64 = 4, 8
"""Bytes of a number."""


class Fitted(NamedTuple):
    """A weight that is fitted: kept inputs, outputs, and number of matrices (of a stack; else 1)."""

    inputs: int
    outputs: int
    matrices: int


class Sizes:
    """``product``: bytes of a number in the dtype of products. ``counts``: parameters of each layer; ``weights``,
    ``largest_layer`` and ``outside``: bytes of all weights, of those of the largest layer, and of those outside the
    layers. ``scaled``: whether the loss is scaled for the backward pass. ``micro``, ``micro_backward``: tokens of a
    micro-batch, forwards and with gradients. ``whole_logits``: whether the model computes the logits of all positions,
    whatever it is asked for. ``mixed``: see `forecast`."""

    def __init__(
        self, structure: Structure, work: Work, dtype: torch.dtype, residency: Residency, *, mixed: bool,
        whole_logits: bool,
    ) -> None:  # fmt: skip
        self.graph, self.work, self.item = structure.graph, work, dtype.itemsize
        self.config = structure.config.get_text_config()
        self.vocabulary, self.hidden = int(self.config.vocab_size), int(self.config.hidden_size)
        self.product = 2 if mixed else self.item
        self.counts = layer_parameters(self.graph)
        self.weights = self.graph.total_parameters * self.item
        self.largest_layer = max(self.counts) * self.item
        self.outside = (self.graph.total_parameters - self.graph.decoder_parameters) * self.item
        self.scaled = str(dtype) == "torch.float16"
        self.whole_logits = whole_logits
        length = max(work.length, 1)
        self.micro = length * max(1, min(work.samples, TOKENS_AT_ONCE // residency.divided // length))
        rows = 1 if Signal.GRAD_SQ in work.signals else TOKENS_WITH_GRADIENTS // residency.divided // length
        self.micro_backward = length * max(1, min(work.samples, rows))

    @property
    def summed(self) -> bool:
        """Whether gradients are float32 sums: over micro-batches, and of a scaled loss."""
        return self.scaled or Signal.GRAD_SQ in self.work.signals or self.work.scored > self.micro_backward

    def consumers(self) -> Iterable[Fitted]:
        """The sizes of every weight that is fitted."""
        for fitted in self.fitted:
            for consumer in fitted.values():
                shape = consumer.shape
                out = shape[-1] if consumer.axis == len(shape) - 2 else shape[-2]
                yield Fitted(len(consumer.kept), out, shape[0] if len(shape) > 2 else 1)

    def consumer_names(self) -> list[str]:
        return [name for fitted in self.fitted for name in fitted]

    @cached_property
    def fitted(self) -> list[dict[str, Consumer]]:
        """The weights of each layer that are fitted."""
        graph, kept, changed = self.graph, self.work.kept, self.work.changed
        return [
            {**consumers_of(graph, kept, number), **intact_readers(graph, kept, number, changed)}
            for number in range(graph.num_layers)
        ]

    def read_widths(self) -> list[tuple[int, int]]:
        """Layer and number of inputs, removed ones included, of every weight that is fitted."""
        return [
            (number, consumer.shape[consumer.axis])
            for number, fitted in enumerate(self.fitted)
            for consumer in fitted.values()
        ]

    def chosen(self, name: str) -> int:
        """How many matrices of a weight a token is multiplied with: those of the experts that it is routed to in a
        stack, else one."""
        return self.configured("num_experts_per_tok", 1) if len(self.graph.shapes[name]) > 2 else 1

    def configured(self, name: str, default: int) -> int:
        """A field of the configuration; ``default`` where it has none, or one for each layer."""
        value = getattr(self.config, name, None)
        return value if isinstance(value, int) else default
