"""The forecast of a prune, computed from shapes before weights are read.

Memory follows from what the code of each stage allocates; the numbers of a layer's activations and all rates are
measured on a sample of one layer (`layer_sample`). ``N``: tokens of a micro-batch, ``H``: hidden size, ``V``:
vocabulary, ``B``: tokens of the calibration set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from math import ceil, prod
from typing import TYPE_CHECKING, Any

from ..compensation.consumers import Consumer, consumers_of, intact_readers
from ..compensation.least_squares import solve_bytes, solve_operations
from ..engine.check import TOKENS as CHECKED
from ..engine.executor import TOKENS_AT_ONCE, TOKENS_WITH_GRADIENTS
from ..engine.journal import INTERVAL
from ..engine.signals import Signal
from ..models.logits import LOGIT_ELEMENTS
from ..structure.kept import parameters_after
from .forecast import LATER, Forecast, Residency, Stage
from .layer_sample import LayerSample, gram_operations, layer_parameters
from .work import Work

if TYPE_CHECKING:
    import torch

    from ..loading.model import Structure

_F32, _F64 = 4, 8
_READ = 1e9
"""Bytes per second that weights are read with: from a fast disk, or from pages that the system still holds."""
_OPENING = 3.0
"""Seconds for building the model, its tokenizer, and the checks of a save."""
_TOKEN = 64
"""Bytes of a calibration token: as a Python number in a list, in two tensors, and as JSON in what a run keeps."""
_STEP = 2e-3
"""Seconds that transformers adds to one step of generation."""
_LOGITS, _DRAWS = 4, 7
"""Copies of the logits in float32 in memory while tokens are drawn, and how often they are read and written."""
_FIRST_ORDER = frozenset({Signal.WEIGHT, Signal.GRAD})


def forecast(
    structure: Structure,
    work: Work,
    dtype: torch.dtype,
    residency: Residency,
    sample: LayerSample | None,
    *,
    base: int,
    mixed: bool = False,
    converting: float | None = None,
    free: int = 0,
) -> Forecast:
    """The `Forecast` of a prune. ``base``: resident bytes of the process before it. ``mixed``: whether products of
    float32 weights are computed in bfloat16. ``sample``: None where no layer could be run; activations are estimated
    from widths then, and the time is not known. ``converting``: values per second that are computed when a layer is
    read; None where it is mapped from its file. ``free``: bytes in which the system keeps files that were read."""
    return _Forecaster(structure, work, dtype, residency, sample, mixed, converting, free).run(base)


class _Forecaster:
    def __init__(
        self,
        structure: Structure,
        work: Work,
        dtype: torch.dtype,
        residency: Residency,
        sample: LayerSample | None,
        mixed: bool,
        converting: float | None,
        free: int,
    ) -> None:
        item = dtype.itemsize
        self.graph, self.work, self.item, self.residency, self.sample = structure.graph, work, item, residency, sample
        self.scaled = str(dtype) == "torch.float16"
        """Whether the loss is scaled for the backward pass."""
        self.converting = converting
        config = structure.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        self.hidden = int(config.hidden_size)
        self.config = config
        self.product = 2 if mixed else item
        self.counts = layer_parameters(self.graph)
        self.largest_layer = max(self.counts) * item
        self.read_once = self.graph.total_parameters * item < free
        """Whether the files stay in the system's memory, so that only the first walk waits for the disk."""
        self.outside = (self.graph.total_parameters - self.graph.decoder_parameters) * item
        length = max(work.length, 1)
        self.micro = length * max(1, min(work.samples, TOKENS_AT_ONCE // residency.divided // length))
        """Tokens of a micro-batch forwards; with gradients:"""
        rows = 1 if Signal.GRAD_SQ in work.signals else TOKENS_WITH_GRADIENTS // residency.divided // length
        self.micro_backward = length * max(1, min(work.samples, rows))

    def run(self, base: int) -> Forecast:
        work = self.work
        stages = [self.opening()]
        if work.written:
            stages.append(self.writing())
        elif work.tokens:
            stages.append(Stage("reading", {**self.weights(), **self.calibration()}, 0.0))
        if work.signals:
            stages.append(self.estimation())
        fit_disk = 0
        if work.fits:
            stage, fit_disk = self.compensation()
            stages.append(stage)
        if work.saves:
            stages.append(self.saving())
        share = parameters_after(self.graph, work.kept)[0] / self.graph.total_parameters
        output = round(self.graph.total_parameters * self.item * share) if work.saves else 0
        disk = max(self.estimation_disk(), output + fit_disk if work.fits else output)
        if self.residency.once:
            disk += self.graph.total_parameters * self.item
        return Forecast(self.residency, base + LATER, tuple(stages), disk)

    # Weights

    def weights(self) -> dict[str, int]:
        """Weights in memory during the stages that run the model."""
        return {**self.always(), **self.two_layers()}

    def always(self) -> dict[str, int]:
        """Weights that are in memory all the time."""
        if self.residency.streamed:
            return {"weights outside the layers": self.outside}
        return {"weights": self.graph.total_parameters * self.item}

    def two_layers(self) -> dict[str, int]:
        """The layer in use, and the next one, which is read meanwhile; where it is computed of what is stored, that
        besides."""
        if not self.residency.streamed:
            return {}
        stored = {} if self.converting is None else {"a layer as it is stored": self.largest_layer}
        return {"weights of two layers": 2 * self.largest_layer, **stored}

    def opening(self) -> Stage:
        # A streamed model has only names and shapes when it is opened; its first walk reads it.
        streamed = self.residency.streamed
        read = self.graph.total_parameters * self.item / _READ if self.read_once or not streamed else 0.0
        if self.residency.once and self.converting is not None:
            # They are written besides; the first walk does both.
            read += self.graph.total_parameters * (1 / self.converting + self.item / _READ)
        return Stage("opening", {} if streamed else self.weights(), self.time(_OPENING + read))

    def reading(self, walks: float) -> float:
        """Seconds of reading the layers in so many walks, the first of all aside where they are read or computed once.
        What is computed once stays in the system's memory (see `computed_once`)."""
        if not self.residency.streamed or self.residency.once:
            return 0.0
        values = walks * sum(self.counts)
        from_disk = 0.0 if self.read_once else values * self.item / _READ
        return from_disk + (0.0 if self.converting is None else values / self.converting)

    # Stages

    def calibration(self) -> dict[str, int]:
        return {"calibration tokens": self.work.tokens * _TOKEN}

    def writing(self) -> Stage:
        rows = max(part.batch for part in self.work.written)
        cached = max(part.batch * part.tokens for part in self.work.written)
        queries = _number(self.config, "num_attention_heads", 1)
        heads = _number(self.config, "num_key_value_heads", queries)
        dim = _number(self.config, "head_dim", self.hidden // queries)
        # Keys are in the dtype of the rotary tables, values in that of products.
        one = cached * heads * dim * (self.item + self.product)
        cache = one * self.graph.num_layers + one  # a step copies those of one layer
        memory = {
            **self.weights(),
            "keys and values": cache,
            "logits": rows * self.vocabulary * _F32 * _LOGITS,
            "activations": self.activations(rows),
            **self.calibration(),
        }
        return Stage("writing", memory, self.writing_seconds())

    def writing_seconds(self) -> float | None:
        sample = self.sample
        if sample is None:
            return None
        total = 0.0
        for part in self.work.written:
            batches = part.passages / part.batch
            head = 2 * part.batch * self.hidden * self.vocabulary / sample.head
            draw = part.batch * self.vocabulary * _F32 * _DRAWS / sample.copy
            step = self.layers(sample.forward.of(part.batch)) + head + draw + _STEP + self.reading(1)
            total += batches * part.tokens * step
        return total

    def estimation(self) -> Stage:
        work, sample = self.work, self.sample
        scoring = self.scoring()
        elements = sum(prod(self.graph.shapes[name]) for name in work.names)
        if not work.scored and work.chooses:
            return Stage("estimation", self.weights(), 0.0)
        if not work.scored:
            took = None if sample is None else elements * 40 / sample.copy
            return Stage("estimation", {**self.weights(), "scores of one parameter": scoring}, took)
        memory = self.always()
        if work.steps > 1:
            memory["a copy of the model"] = self.graph.total_parameters * self.item
        if work.trials:
            memory["logits of trials"] = 3 * 2048 * self.vocabulary * _F32
            memory["Gram matrices"] = sum(w * w * s * _F32 for w, _, s in self.consumers())
        seconds: float | None = None
        if work.gradients:
            memory["hidden states"] = self.in_memory(self.between())
            of_weights = bool(work.signals & {Signal.GRAD, Signal.GRAD_SQ})
            arguments = self.layer_gradients() if of_weights else self.product_bytes()
            what = "gradients of one layer" if of_weights else "products of one layer"
            head = self.logits_at_once(self.micro_backward) * (self.item + 3 * _F32)
            backward = self.activations(self.micro_backward, backward=True) + arguments
            memory |= largest_of(
                {"logits and their gradients": head},
                {**self.two_layers(), what: arguments, "activations": backward - arguments},
                {**self.two_layers(), what: arguments, "scores of one parameter": scoring},
            )
            if sample is not None:
                seconds = self.gradient_seconds(sample, elements)
        else:
            memory["hidden states"] = self.in_memory(self.streams(work.scored) * (self.stream_copies()))
            memory |= self.two_layers()
            memory |= largest_of(
                {"the check of the walk": self.check_bytes()},
                {"activations and sums of inputs": self.watched(work.names)},
                {"statistics of one layer": self.statistics(work.names), "scores of one parameter": scoring},
            )
            if sample is not None:
                seconds = self.forward_seconds(sample, work.scored, work.names) + elements * 40 / sample.copy
        if seconds is not None and sample is not None:
            seconds = seconds * work.steps + work.trials * self.layers(sample.forward.of(2048))
        return Stage("estimation", memory, seconds)

    def compensation(self) -> tuple[Stage, int]:
        work, sample = self.work, self.sample
        memory = self.weights()
        consumers = list(self.consumers())
        solved = [(w, o, s) for w, o, s in consumers if w and o]
        tokens, micro = work.tokens, self.micro
        # h and ĥ; the inputs of the last matrix; h after the layer where an earlier matrix is fitted too.
        widest = max((full for _, full in self.read_widths()), default=0)
        streams = 2 * self.streams(tokens) + tokens * widest * self.product
        if len(self.read_widths()) > self.graph.num_layers:
            streams += self.streams(tokens)
        memory["hidden states"] = self.in_memory(streams)
        targets = 2 if work.mixed else 1
        sums = max((2 * s * w * (w + targets * o) * _F32 for w, o, s in solved), default=0)
        solve = max((solve_bytes(w, o) for w, o, _ in solved), default=0)
        width = max((w for w, _, _ in solved), default=0)
        # ĥ before and after the layer, h, y, the target and its difference, squares in float64; all inputs, kept ones.
        rows = micro * (self.hidden * (6 * _F32 + _F64 + _F32) + widest * self.product + width * (_F32 + self.product))
        scoring = self.scoring()
        memory |= largest_of(
            {"the check of the walk": self.check_bytes()},
            {"logits of one sample": 4 * self.logits_of_one_sample()} if work.weighted else {},
            {"sums of the fits": sums, "activations": max(rows, self.activations(micro))},
            {"sums of the fits": sums, "solving one fit": solve},
            {"Gram matrices": self.grams(), "activations": self.activations(micro)} if work.weighted else {},
            {"activations and sums of inputs": self.watched(work.names)} if work.chooses else {},
            {"statistics of one layer": self.statistics(work.names), "scores": scoring} if work.chooses else {},
        )
        seconds = None if sample is None else self.fit_seconds(sample, solved)
        journal = sum(prod(self.graph.shapes[n]) for n in self.consumer_names()) * self.item
        if seconds is None or seconds > INTERVAL:
            # The states of the last layer that was written, and those that replace them.
            journal += 4 * self.streams(tokens)
        beyond = streams - self.in_memory(streams)
        return Stage("compensation", memory, seconds), journal + beyond

    def saving(self) -> Stage:
        sample = self.sample
        output = self.graph.total_parameters * self.item
        if self.residency.streamed:
            memory = {**self.weights(), "the cut of one layer": self.largest_layer}
            if any(self.graph.by_name[name].layer is None for name in self.work.kept):
                memory["the cut of what is outside"] = self.outside
        else:
            memory = self.weights()
        seconds = None if sample is None else _OPENING + output / _READ + 2 * output / sample.copy + self.reading(1)
        return Stage("saving", memory, seconds)

    def estimation_disk(self) -> int:
        if not self.work.scored:
            return 0
        streams = self.between() if self.work.gradients else self.streams(self.work.scored) * self.stream_copies()
        return streams - self.in_memory(streams)

    # Parts of memory

    def streams(self, tokens: int) -> int:
        """Hidden states of one model in float32."""
        return tokens * self.hidden * _F32

    def stream_copies(self) -> int:
        """Sequences of hidden states that are alive in a forward walk."""
        if Signal.STREAM_BLOCKS in self.work.signals:
            return self.graph.num_layers + 1
        return 2 if Signal.STREAM in self.work.signals else 1

    def between(self) -> int:
        """Hidden states between all layers and the gradients, in the dtype of the model."""
        return self.work.scored * self.hidden * self.item * (self.graph.num_layers + 2)

    def in_memory(self, streams: int) -> int:
        return min(streams, self.residency.boundary_memory)

    def activations(self, tokens: int, *, backward: bool = False) -> int:
        """Largest tensors that are alive while a layer runs, without gradients of weights."""
        sample = self.sample
        if sample is None:
            widths = [shape[0] for name, shape in self.graph.shapes.items() if self.graph.layer_of(name) == 0]
            return tokens * (4 * self.hidden + 4 * max(widths, default=0)) * _F32 * (3 if backward else 1)
        if backward:
            return round(sample.backward_bytes.token * tokens)
        return round(sample.forward_bytes.of(tokens))

    def layer_gradients(self) -> int:
        """Float32 sums, the gradients of one micro-batch, and a float32 copy of one, of the largest layer. A single
        micro-batch needs no sums."""
        by_layer: dict[int | None, list[int]] = {}
        for name in self.work.names:
            by_layer.setdefault(self.graph.layer_of(name), []).append(prod(self.graph.shapes[name]))
        kinds = len(self.work.signals & {Signal.GRAD, Signal.GRAD_SQ})
        sums = kinds if self.summed else 0
        copy = _F32 if self.summed and self.item != _F32 else 0
        return max(
            (sum(found) * (sums * _F32 + self.item) + max(found) * copy for found in by_layer.values()), default=0
        )

    def product_bytes(self) -> int:
        """Products of one layer's weights in the backward pass: inputs and outputs in float32, and what a criterion
        computes of one of them, with a float32 copy of its weight."""
        chosen = _number(self.config, "num_experts_per_tok", 1)
        kept: dict[int | None, int] = {}
        largest = 0
        for name in self.work.names:
            shape = self.graph.shapes[name]
            if len(shape) < 2:
                continue
            rows = self.micro_backward * (chosen if len(shape) > 2 else 1)
            layer, widths = self.graph.layer_of(name), shape[-1] + shape[-2]
            kept[layer] = kept.get(layer, 0) + rows * widths * _F32
            weight = 0 if self.item == _F32 else prod(shape[-2:]) * _F32
            largest = max(largest, rows * (shape[-2] + 3 * max(shape[-2:])) * _F32 + weight)
        return max(kept.values(), default=0) + largest

    @property
    def summed(self) -> bool:
        """Whether gradients are float32 sums: over micro-batches, and of a scaled loss."""
        return self.scaled or Signal.GRAD_SQ in self.work.signals or self.work.scored > self.micro_backward

    def scoring(self) -> int:
        """Float32 copies of the largest weight and of its gradient, and its saliency; with a Gram matrix, float64
        copies of it."""
        if Signal.WEIGHT not in self.work.signals:
            return 0
        elements = max((self.at_once(self.graph.shapes[name]) for name in self.work.names), default=0)
        copies = 0 if self.item == _F32 else _F32
        if self.work.gradients and not self.summed:
            copies *= 2
        # |w|, w² and w·g are one tensor; other saliencies are made of two.
        found = elements * (copies + (1 if self.work.signals <= _FIRST_ORDER else 2) * _F32)
        if Signal.GRAM in self.work.signals:
            widest = max((full for _, full in self.read_widths()), default=0)
            found = max(found, 4 * widest**2 * _F64 + 2 * elements * _F64)
        return found

    def at_once(self, shape: tuple[int, ...]) -> int:
        """Elements of a parameter that are scored together."""
        return prod(shape[1:] if self.work.by_matrix and len(shape) == 3 else shape)

    def statistics(self, names: Iterable[str]) -> int:
        """Gram matrices of one layer's inputs, as sums and as means."""
        if Signal.GRAM not in self.work.signals:
            return 0
        by_layer: dict[int | None, int] = {}
        for name in names:
            shape = self.graph.shapes[name]
            if len(shape) > 1:
                layer = self.graph.layer_of(name)
                by_layer[layer] = by_layer.get(layer, 0) + shape[-1] ** 2 * _F32 * (shape[0] if len(shape) > 2 else 1)
        return 3 * max(by_layer.values(), default=0)

    def watched(self, names: Iterable[str]) -> int:
        """A layer runs while the inputs of its weights are summed: inputs in float32, their squares in float64."""
        widths = [self.graph.shapes[name][-1] for name in names if len(self.graph.shapes[name]) > 1]
        widest = max(widths, default=0)
        inputs = self.micro * widest * (self.product + (0 if self.product == _F32 else _F32) + _F32 + _F64)
        own = self.micro * self.hidden * 3 * _F32
        return max(self.activations(self.micro), own + inputs) + self.statistics(names) // 3

    def check_bytes(self) -> int:
        """The check of a walk runs the whole model on some tokens, and keeps the hidden states between layers."""
        tokens = min(self.work.length, CHECKED)
        logits = self.vocabulary * self.item * (tokens if self.whole_logits else 1)
        return logits + self.activations(tokens) + 2 * self.graph.num_layers * tokens * self.hidden * self.item

    def logits_of_one_sample(self) -> int:
        return self.work.length * self.vocabulary * self.item

    def logits_at_once(self, tokens: int) -> int:
        """Numbers of logits of a micro-batch that are in memory together."""
        every = tokens * self.vocabulary
        return every if self.whole_logits else min(every, max(LOGIT_ELEMENTS, self.vocabulary))

    @property
    def whole_logits(self) -> bool:
        """Whether the model computes the logits of all positions, whatever it is asked for."""
        return self.sample is not None and self.sample.whole_logits

    def consumers(self) -> Iterable[tuple[int, int, int]]:
        """Kept inputs, outputs, and number of matrices, of every weight that is fitted."""
        for fitted in self.fitted:
            for consumer in fitted.values():
                shape = consumer.shape
                out = shape[-1] if consumer.axis == len(shape) - 2 else shape[-2]
                yield len(consumer.kept), out, shape[0] if len(shape) > 2 else 1

    def consumer_names(self) -> list[str]:
        return [name for fitted in self.fitted for name in fitted]

    def grams(self) -> int:
        """Bytes of the Gram matrices of all inputs of one layer's fitted weights."""
        shapes = [[consumer.shape for consumer in fitted.values()] for fitted in self.fitted]
        return max((sum(prod(s[:-2]) * max(s[-2:]) ** 2 * _F32 for s in found) for found in shapes), default=0)

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

    # Time

    def time(self, seconds: float) -> float | None:
        return None if self.sample is None else seconds

    def layers(self, seconds: float) -> float:
        """Of all layers, if the sampled one takes ``seconds``."""
        assert self.sample is not None
        return seconds * sum(self.counts) / self.sample.parameters

    def walk_seconds(self, sample: LayerSample, tokens: int) -> float:
        """One walk forwards."""
        batches = max(1, ceil(tokens / self.micro))
        return self.layers(sample.forward.fixed * batches + sample.forward.token * tokens) + self.reading(1)

    def check_seconds(self, sample: LayerSample) -> float:
        """A walk's check, which runs the model twice on some tokens, and once its head."""
        tokens = min(self.work.length, CHECKED)
        scored = tokens if self.whole_logits else 1
        head = 2 * scored * self.hidden * self.vocabulary / (sample.product32 if self.item == _F32 else sample.head)
        return 2 * self.layers(sample.plain.of(tokens)) + head + self.reading(2)

    def forward_seconds(self, sample: LayerSample, tokens: int, names: Iterable[str]) -> float:
        return self.walk_seconds(sample, tokens) + self.check_seconds(sample) + self.summing(sample, tokens, names)

    def summing(self, sample: LayerSample, tokens: int, names: Iterable[str]) -> float:
        """Sums of inputs: read three times, in float32 and float64."""
        widths = [self.graph.shapes[name][-1] for name in names if len(self.graph.shapes[name]) > 1]
        seconds = sum(widths) * tokens * 2 * (_F32 + _F64) / sample.copy
        if Signal.GRAM in self.work.signals:
            seconds += sum(gram_operations(width) for width in widths) * tokens / sample.gram
        return seconds

    def gradient_seconds(self, sample: LayerSample, elements: int) -> float:
        tokens, micro = self.work.scored, self.micro_backward
        batches = max(1, ceil(tokens / micro))
        exact = self.work.exact and self.item == _F32
        rate = sample.product32 if exact else sample.head
        # Forwards, and backwards with a product for the inputs only: the head gets no gradient.
        head = 4 * tokens * self.hidden * self.vocabulary / rate + 6 * tokens * self.vocabulary * _F32 / sample.copy
        forward = self.layers(sample.plain.fixed * batches + sample.plain.token * tokens)
        backward = self.layers(sample.backward.fixed * batches + sample.backward.token * tokens)
        sums = elements * _F32 * 2 * batches / sample.copy
        others = self.summing(sample, tokens, self.work.names) if Signal.GRAM in self.work.signals else 0.0
        others += self.check_seconds(sample) if self.residency.streamed else 0.0
        if Signal.PRODUCT_GRAD in self.work.signals:
            # Gradients of inputs, from those of outputs.
            chosen = _number(self.config, "num_experts_per_tok", 1)
            shapes = [self.graph.shapes[name] for name in self.work.names]
            sizes = sum(prod(shape[-2:]) * (chosen if len(shape) > 2 else 1) for shape in shapes)
            others += 2 * tokens * sizes / rate
        return head + forward + backward + sums + others + elements * 40 / sample.copy + self.reading(3)

    def fit_seconds(self, sample: LayerSample, solved: Sequence[tuple[int, int, int]]) -> float:
        tokens = self.work.tokens
        stages = max(1.0, len(solved) / self.graph.num_layers)
        targets = 2 if self.work.mixed else 1
        # h and ĥ once for the last matrix of a layer; both again for every other one.
        walks = 2 * stages * self.walk_seconds(sample, tokens) - (2 * stages - 1) * self.reading(1)
        seconds = walks + self.check_seconds(sample)
        if self.work.chooses:
            seconds += self.summing(sample, tokens, self.work.names)
        if self.work.weighted:
            seconds += self.weighing(sample, solved)
        for width, out, slots in solved:
            cross = tokens * 2 * width * out * targets
            seconds += tokens * gram_operations(width) / sample.gram + cross / sample.product32
            # The outputs with the new weights.
            seconds += tokens * 2 * width * out / (sample.head if self.product == 2 else sample.product32)
            factor, products = solve_operations(
                width, out, holds_out_sources=self.work.holds_out_sources, mixed=self.work.mixed
            )
            seconds += slots * (factor / sample.factor + products / sample.product64)
        return seconds

    def weighing(self, sample: LayerSample, solved: Sequence[tuple[int, int, int]]) -> float:
        """Two walks, Gram matrices of the inputs, and the logits of both models."""
        tokens = self.work.tokens
        grams = sum(tokens * gram_operations(width) for width, _, _ in solved) / sample.gram
        head = 2 * tokens * self.hidden * self.vocabulary / (sample.product32 if self.item == _F32 else sample.head)
        softmax = 6 * tokens * self.vocabulary * _F32 / sample.copy
        return 2 * self.walk_seconds(sample, tokens) + self.check_seconds(sample) + grams + 2 * (head + softmax)


def largest_of(*phases: dict[str, int]) -> dict[str, int]:
    """The phase with the largest sum; phases follow one another."""
    sums = [sum(phase.values()) for phase in phases]
    return phases[sums.index(max(sums))]


def _number(config: Any, name: str, default: int) -> int:
    """A field of a configuration; ``default`` where it has none, or one for each layer."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else default
