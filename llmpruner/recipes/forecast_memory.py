"""The memory that a prune needs: bytes of what its stages hold at one time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from ..engine.check import TOKENS as CHECKED
from ..engine.signals import Signal
from ..models.positions import LOGIT_ELEMENTS
from ..pruning.compensation.least_squares import solve_bytes
from ..pruning.compensation.trials import TRIED
from .forecast import Residency
from .forecast_sizes import F32, F64, Fitted, Sizes
from .layer_sample import LayerSample

_TOKEN = 64
"""Bytes of a calibration token: as a Python number in a list, in two tensors, and as JSON in what a run keeps."""
_LOGITS = 4
"""Copies of the logits in float32 in memory while tokens are drawn."""
_FIRST_ORDER = frozenset({Signal.WEIGHT, Signal.GRAD})


class Memory:
    """``sample``: None where no layer could be run; activations are estimated from widths then. ``converts``: whether
    layers are computed of what is stored when they are read."""

    def __init__(self, sizes: Sizes, residency: Residency, sample: LayerSample | None, *, converts: bool) -> None:
        self.sizes, self.graph, self.work = sizes, sizes.graph, sizes.work
        self.hidden, self.vocabulary = sizes.hidden, sizes.vocabulary
        self.item, self.product = sizes.item, sizes.product
        self.residency, self.sample, self.converts = residency, sample, converts

    def weights(self) -> dict[str, int]:
        """Weights in memory during the stages that run the model."""
        return {**self.always(), **self.two_layers()}

    def always(self) -> dict[str, int]:
        """Weights that are in memory all the time."""
        if self.residency.streamed:
            return {"weights outside the layers": self.sizes.outside}
        return {"weights": self.sizes.weights}

    def two_layers(self) -> dict[str, int]:
        """The layer in use, and the next one, which is read meanwhile; where it is computed of what is stored, that
        besides."""
        if not self.residency.streamed:
            return {}
        stored = {"a layer as it is stored": self.sizes.largest_layer} if self.converts else {}
        return {"weights of two layers": 2 * self.sizes.largest_layer, **stored}

    def calibration(self) -> dict[str, int]:
        return {"calibration tokens": self.work.tokens * _TOKEN}

    # Stages

    def writing(self) -> dict[str, int]:
        """While the model writes calibration text."""
        rows = max(part.batch for part in self.work.written)
        cached = max(part.batch * part.tokens for part in self.work.written)
        queries = self.sizes.configured("num_attention_heads", 1)
        heads = self.sizes.configured("num_key_value_heads", queries)
        dim = self.sizes.configured("head_dim", self.hidden // queries)
        # Keys are in the dtype of the rotary tables, values in that of products.
        one = cached * heads * dim * (self.item + self.product)
        cache = one * self.graph.num_layers + one  # a step copies those of one layer
        return {
            **self.weights(),
            "keys and values": cache,
            "logits": rows * self.vocabulary * F32 * _LOGITS,
            "activations": self.activations(rows),
            **self.calibration(),
        }

    def estimation(self) -> dict[str, int]:
        """While units are scored on calibration text."""
        work = self.work
        scoring = self.scoring()
        memory = self.always()
        if work.steps > 1:
            memory["a copy of the model"] = self.sizes.weights
        if work.trials:
            memory["logits of trials"] = 3 * TRIED * self.vocabulary * F32
            memory["Gram matrices"] = sum(f.matrices * f.inputs**2 * F32 for f in self.sizes.consumers())
        if work.gradients:
            memory["hidden states"] = self.in_memory(self.between())
            of_weights = bool(work.signals & {Signal.GRAD, Signal.GRAD_SQ})
            arguments = self.layer_gradients() if of_weights else self.product_bytes()
            what = "gradients of one layer" if of_weights else "products of one layer"
            head = self.logits_at_once(self.sizes.micro_backward) * (self.item + 3 * F32)
            backward = self.activations(self.sizes.micro_backward, backward=True) + arguments
            memory |= largest_of(
                {"logits and their gradients": head},
                {**self.two_layers(), what: arguments, "activations": backward - arguments},
                {**self.two_layers(), what: arguments, "scores of one parameter": scoring},
            )
        else:
            memory["hidden states"] = self.in_memory(self.streams(work.scored) * (self.stream_copies()))
            memory |= self.two_layers()
            memory |= largest_of(
                {"the check of the walk": self.check_bytes()},
                {"activations and sums of inputs": self.watched(work.names)},
                {"statistics of one layer": self.statistics(work.names), "scores of one parameter": scoring},
            )
        return memory

    def compensation(self, solved: Sequence[Fitted]) -> tuple[dict[str, int], int]:
        """While weights are fitted, of which those of ``solved`` by least squares; and bytes of the hidden states, in
        memory or beyond."""
        work, memory = self.work, self.weights()
        tokens, micro = work.tokens, self.sizes.micro
        # h and ĥ; the inputs of the last matrix; h after the layer where an earlier matrix is fitted too.
        widest = max((full for _, full in self.sizes.read_widths()), default=0)
        streams = 2 * self.streams(tokens) + tokens * widest * self.product
        if len(self.sizes.read_widths()) > self.graph.num_layers:
            streams += self.streams(tokens)
        memory["hidden states"] = self.in_memory(streams)
        targets = 2 if work.mixed else 1
        sums = max((2 * f.matrices * f.inputs * (f.inputs + targets * f.outputs) * F32 for f in solved), default=0)
        solve = max((solve_bytes(fit.inputs, fit.outputs) for fit in solved), default=0)
        width = max((fit.inputs for fit in solved), default=0)
        # ĥ before and after the layer, h, y, the target and its difference, squares in float64; all inputs, kept ones.
        rows = micro * (self.hidden * (6 * F32 + F64 + F32) + widest * self.product + width * (F32 + self.product))
        scoring = self.scoring()
        memory |= largest_of(
            {"the check of the walk": self.check_bytes()},
            {"logits of one sample": 4 * work.length * self.vocabulary * self.item} if work.weighted else {},
            {"sums of the fits": sums, "activations": max(rows, self.activations(micro))},
            {"sums of the fits": sums, "solving one fit": solve},
            {"Gram matrices": self.grams(), "activations": self.activations(micro)} if work.weighted else {},
            {"activations and sums of inputs": self.watched(work.names)} if work.chooses else {},
            {"statistics of one layer": self.statistics(work.names), "scores": scoring} if work.chooses else {},
        )
        return memory, streams

    def saving(self) -> dict[str, int]:
        """While the result is cut and written."""
        if self.residency.streamed:
            memory = {**self.weights(), "the cut of one layer": self.sizes.largest_layer}
            if any(self.graph.by_name[name].layer is None for name in self.work.kept):
                memory["the cut of what is outside"] = self.sizes.outside
        else:
            memory = self.weights()
        return memory

    def estimation_disk(self) -> int:
        """Bytes of hidden states in a file."""
        if not self.work.scored:
            return 0
        streams = self.between() if self.work.gradients else self.streams(self.work.scored) * self.stream_copies()
        return streams - self.in_memory(streams)

    # Parts of stages

    def streams(self, tokens: int) -> int:
        """Hidden states of one model in float32."""
        return tokens * self.hidden * F32

    def stream_copies(self) -> int:
        """Sequences of hidden states that are alive in a forward walk."""
        if Signal.STREAM_BLOCKS in self.work.signals:
            return self.graph.num_layers + 1
        return 2 if Signal.STREAM in self.work.signals else 1

    def between(self) -> int:
        """Hidden states between all layers and the gradients, in the dtype of the model."""
        return self.work.scored * self.hidden * self.item * (self.graph.num_layers + 2)

    def in_memory(self, streams: int) -> int:
        """Of hidden states, those that are not in a file."""
        return min(streams, self.residency.boundary_memory)

    def activations(self, tokens: int, *, backward: bool = False) -> int:
        """Largest tensors that are alive while a layer runs, without gradients of weights."""
        sample = self.sample
        if sample is None:
            widths = [shape[0] for name, shape in self.graph.shapes.items() if self.graph.layer_of(name) == 0]
            return tokens * (4 * self.hidden + 4 * max(widths, default=0)) * F32 * (3 if backward else 1)
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
        sums = kinds if self.sizes.summed else 0
        copy = F32 if self.sizes.summed and self.item != F32 else 0
        return max(
            (sum(found) * (sums * F32 + self.item) + max(found) * copy for found in by_layer.values()), default=0
        )

    def product_bytes(self) -> int:
        """Products of one layer's weights in the backward pass: inputs and outputs in float32, the criterion's sums in
        float64, and what it computes of one of them, with a float32 copy of its weight; the result is added to the
        sums in float64."""
        kept: dict[int | None, int] = {}
        largest = 0
        for name in self.work.names:
            shape = self.graph.shapes[name]
            if len(shape) < 2:
                continue
            rows = self.sizes.micro_backward * self.sizes.chosen(name)
            layer, widths = self.graph.layer_of(name), shape[-1] + shape[-2]
            numbers = self.work.measured.get(name, 0)
            kept[layer] = kept.get(layer, 0) + rows * widths * F32 + numbers * F64
            weight = 0 if self.item == F32 else prod(shape[-2:]) * F32
            added = numbers // prod(shape[:-2]) * (F32 + F64)
            largest = max(largest, rows * (shape[-2] + 3 * max(shape[-2:])) * F32 + weight + added)
        return max(kept.values(), default=0) + largest

    def scoring(self) -> int:
        """Float32 copies of the largest weight and of its gradient, and its saliency; with a Gram matrix, float64
        copies of it."""
        if Signal.WEIGHT not in self.work.signals:
            return 0
        elements = max((self.at_once(self.graph.shapes[name]) for name in self.work.names), default=0)
        copies = 0 if self.item == F32 else F32
        if self.work.gradients and not self.sizes.summed:
            copies *= 2
        # |w|, w² and w·g are one tensor; other saliencies are made of two.
        found = elements * (copies + (1 if self.work.signals <= _FIRST_ORDER else 2) * F32)
        if Signal.GRAM in self.work.signals:
            widest = max((full for _, full in self.sizes.read_widths()), default=0)
            found = max(found, 4 * widest**2 * F64 + 2 * elements * F64)
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
                by_layer[layer] = by_layer.get(layer, 0) + shape[-1] ** 2 * F32 * (shape[0] if len(shape) > 2 else 1)
        return 3 * max(by_layer.values(), default=0)

    def watched(self, names: Iterable[str]) -> int:
        """A layer runs while the inputs of its weights are summed: inputs in float32, their squares in float64."""
        widths = [self.graph.shapes[name][-1] for name in names if len(self.graph.shapes[name]) > 1]
        widest = max(widths, default=0)
        inputs = self.sizes.micro * widest * (self.product + (0 if self.product == F32 else F32) + F32 + F64)
        own = self.sizes.micro * self.hidden * 3 * F32
        return max(self.activations(self.sizes.micro), own + inputs) + self.statistics(names) // 3

    def check_bytes(self) -> int:
        """The check of a walk runs the whole model on some tokens, and keeps the hidden states between layers."""
        tokens = min(self.work.length, CHECKED)
        logits = self.vocabulary * self.item * (tokens if self.sizes.whole_logits else 1)
        return logits + self.activations(tokens) + 2 * self.graph.num_layers * tokens * self.hidden * self.item

    def logits_at_once(self, tokens: int) -> int:
        """Numbers of logits of a micro-batch that are in memory together."""
        every = tokens * self.vocabulary
        return every if self.sizes.whole_logits else min(every, max(LOGIT_ELEMENTS, self.vocabulary))

    def grams(self) -> int:
        """Bytes of the Gram matrices of all inputs of one layer's fitted weights."""
        shapes = [[consumer.shape for consumer in fitted.values()] for fitted in self.sizes.fitted]
        return max((sum(prod(s[:-2]) * max(s[-2:]) ** 2 * F32 for s in found) for found in shapes), default=0)


def largest_of(*phases: dict[str, int]) -> dict[str, int]:
    """The phase with the largest sum; phases follow one another."""
    sums = [sum(phase.values()) for phase in phases]
    return phases[sums.index(max(sums))]
