"""The time that a prune takes, by the rates that were measured on a sample of one layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, prod

from ..engine.check import TOKENS as CHECKED
from ..engine.signals import Signal
from ..pruning.compensation.least_squares import solve_operations
from .forecast import Residency
from .forecast_sizes import F32, F64, Fitted, Sizes
from .layer_sample import LayerSample, gram_operations

OPENING = 3.0
"""Seconds for building the model, its tokenizer, and the checks of a save."""
READ = 1e9
"""Bytes per second that weights are read with: from a fast disk, or from pages that the system still holds."""
_STEP = 2e-3
"""Seconds that transformers adds to one step of generation."""
_DRAWS = 7
"""How often the logits are read and written while tokens are drawn."""
_SCORED = 40
"""Bytes that are read and written for the score of one number."""


class Time:
    """In seconds. ``converting``: see `forecast`. ``read_once``: whether the files stay in the system's memory, so that
    only the first walk waits for the disk."""

    def __init__(
        self, sizes: Sizes, residency: Residency, sample: LayerSample, converting: float | None, *, read_once: bool
    ) -> None:
        self.sizes, self.graph, self.work, self.sample = sizes, sizes.graph, sizes.work, sample
        self.residency, self.converting, self.read_once = residency, converting, read_once

    def reading(self, walks: float) -> float:
        """Seconds of reading the layers in so many walks, the first of all aside where they are read or computed once.
        What is computed once stays in the system's memory (see `computed_once`)."""
        if not self.residency.streamed or self.residency.once:
            return 0.0
        values = walks * sum(self.sizes.counts)
        from_disk = 0.0 if self.read_once else values * self.sizes.item / READ
        return from_disk + (0.0 if self.converting is None else values / self.converting)

    def layers(self, seconds: float) -> float:
        """Of all layers, if the sampled one takes ``seconds``."""
        return seconds * sum(self.sizes.counts) / self.sample.parameters

    def writing(self) -> float:
        """The calibration text that the model writes, a token at a time."""
        total = 0.0
        for part in self.work.written:
            batches = part.passages / part.batch
            head = self.head(part.batch) / self.sample.head
            draw = part.batch * self.sizes.vocabulary * F32 * _DRAWS / self.sample.copy
            step = self.layers(self.sample.forward.of(part.batch)) + head + draw + _STEP + self.reading(1)
            total += batches * part.tokens * step
        return total

    def walk(self, tokens: int) -> float:
        """One walk forwards."""
        batches = max(1, ceil(tokens / self.sizes.micro))
        return self.layers(self.sample.forward.fixed * batches + self.sample.forward.token * tokens) + self.reading(1)

    def check(self) -> float:
        """A walk's check, which runs the model twice on some tokens, and once its head."""
        tokens = min(self.work.length, CHECKED)
        scored = tokens if self.sizes.whole_logits else 1
        head = self.head(scored) / self.head_rate
        return 2 * self.layers(self.sample.plain.of(tokens)) + head + self.reading(2)

    def forward(self, tokens: int, names: Iterable[str]) -> float:
        """A walk forwards with the sums of inputs of the weights ``names``."""
        return self.walk(tokens) + self.check() + self.summing(tokens, names)

    def summing(self, tokens: int, names: Iterable[str]) -> float:
        """Sums of inputs: read three times, in float32 and float64."""
        widths = [self.graph.shapes[name][-1] for name in names if len(self.graph.shapes[name]) > 1]
        seconds = sum(widths) * tokens * 2 * (F32 + F64) / self.sample.copy
        if Signal.GRAM in self.work.signals:
            seconds += sum(gram_operations(width) for width in widths) * tokens / self.sample.gram
        return seconds

    def gradients(self, elements: int) -> float:
        """A walk forwards and backwards, with the scores of so many ``elements`` of weights."""
        tokens, micro = self.work.scored, self.sizes.micro_backward
        batches = max(1, ceil(tokens / micro))
        rate = self.head_rate if self.work.exact else self.sample.head
        # Forwards, and backwards with a product for the inputs only: the head gets no gradient.
        head = 2 * self.head(tokens) / rate + self.softmax(tokens)
        forward = self.layers(self.sample.plain.fixed * batches + self.sample.plain.token * tokens)
        backward = self.layers(self.sample.backward.fixed * batches + self.sample.backward.token * tokens)
        sums = elements * F32 * 2 * batches / self.sample.copy
        others = self.summing(tokens, self.work.names) if Signal.GRAM in self.work.signals else 0.0
        others += self.check() if self.residency.streamed else 0.0
        if Signal.PRODUCT_GRAD in self.work.signals:
            # Gradients of inputs, from those of outputs.
            sizes = [prod(self.graph.shapes[name][-2:]) * self.sizes.chosen(name) for name in self.work.names]
            others += 2 * tokens * sum(sizes) / rate
        return head + forward + backward + sums + others + self.scoring(elements) + self.reading(3)

    def fits(self, solved: Sequence[Fitted]) -> float:
        """The compensation, with the fits ``solved``."""
        tokens = self.work.tokens
        stages = max(1.0, len(solved) / self.graph.num_layers)
        targets = 2 if self.work.mixed else 1
        # h and ĥ once for the last matrix of a layer; both again for every other one.
        walks = 2 * stages * self.walk(tokens) - (2 * stages - 1) * self.reading(1)
        seconds = walks + self.check()
        if self.work.chooses:
            seconds += self.summing(tokens, self.work.names)
        if self.work.weighted:
            seconds += self.weighing(solved)
        for width, out, matrices in solved:
            cross = tokens * 2 * width * out * targets
            seconds += tokens * gram_operations(width) / self.sample.gram + cross / self.sample.product32
            # The outputs with the new weights.
            seconds += (
                tokens * 2 * width * out / (self.sample.head if self.sizes.product == 2 else self.sample.product32)
            )
            factor, products = solve_operations(
                width, out, holds_out_sources=self.work.holds_out_sources, mixed=self.work.mixed
            )
            seconds += matrices * (factor / self.sample.factor + products / self.sample.product64)
        return seconds

    def weighing(self, solved: Sequence[Fitted]) -> float:
        """Two walks, Gram matrices of the inputs, and the logits of both models."""
        tokens = self.work.tokens
        grams = sum(tokens * gram_operations(width) for width, _, _ in solved) / self.sample.gram
        head = self.head(tokens) / self.head_rate
        return 2 * self.walk(tokens) + self.check() + grams + 2 * (head + self.softmax(tokens))

    def scoring(self, elements: int) -> float:
        """Scores of so many numbers of weights."""
        return elements * _SCORED / self.sample.copy

    def saving(self) -> float:
        """The result is cut, written, and read again to be checked."""
        return OPENING + self.sizes.weights / READ + 2 * self.sizes.weights / self.sample.copy + self.reading(1)

    def head(self, tokens: int) -> int:
        """Operations of the head for so many tokens."""
        return 2 * tokens * self.sizes.hidden * self.sizes.vocabulary

    @property
    def head_rate(self) -> float:
        """Operations of the head per second."""
        return self.sample.product32 if self.sizes.item == F32 else self.sample.head

    def softmax(self, tokens: int) -> float:
        """Softmax of the logits, in float32."""
        return 6 * tokens * self.sizes.vocabulary * F32 / self.sample.copy
