"""What a prune will take: peak memory and disk within a quarter, time within half. By it, weights are loaded in memory
or read layer by layer.

Memory is that of the process, the weights (or two layers of them), the hidden states up to their limit, and what the
largest stage needs: logits of text that is written, gradients or statistics of one layer, or the sums of one fit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, prod
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch

from ..calibration.written import passages_at_once
from ..engine.boundaries import DEFAULT_LIMIT
from ..engine.execution import TOKENS_AT_ONCE, TOKENS_WITH_GRADIENTS
from ..engine.memory import LayerSample, gram_operations, sample_layer
from ..engine.signals import GRADIENTS, Signal
from ..engine.statistics import PREDICTED
from ..errors import SettingsError
from ..models.generation import cached_bytes
from ..models.model import Model
from ..models.numbers import check_device, dtype_of, multiplies_bfloat16_fast
from ..models.opening import why_not_streamed
from ..models.positions import LOGIT_ELEMENTS
from ..progress import QUIET
from ..structure.coupling import VOCABULARY, Role
from ..values import bytes_text
from .criteria.estimate import scored_spans
from .job import PruneJob, ReplayJob
from .selection import GRADIENT_TOKENS
from .targets import scope_of

if TYPE_CHECKING:
    from ..discovery.opening import Opener
    from ..models.model import Structure

_LOG = logging.getLogger("llmpruner")
F32 = 4
MODULES = 96 << 20
"""Bytes of modules that are imported during the work, of the tokenizer, and of the allocator's free lists."""
READ, COPY = 1e9, 5e9
"""Bytes per second of weights that are read or written, and of tensors that are copied."""
START = 3.0
"""Seconds for building the model, its tokenizer, and the checks of a save."""


@dataclass(frozen=True)
class Forecast:
    """``streamed``: weights are read layer by layer. ``memory``: largest resident bytes; ``disk``: bytes
    that are written; ``seconds``: None where no layer could be timed."""

    streamed: bool
    memory: int
    disk: int
    seconds: float | None

    def as_json(self) -> dict[str, Any]:
        """JSON values: bytes and seconds."""
        seconds = None if self.seconds is None else round(self.seconds, 1)
        return {"memory": self.memory, "disk": self.disk, "seconds": seconds, "streamed": self.streamed}

    def __str__(self) -> str:
        time, seconds = "", self.seconds
        if seconds is not None:
            long = f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
            time = f" and {f'{max(round(seconds), 1)} s' if seconds < 90 else long}"
        disk = f", {bytes_text(self.disk)} of disk" if self.disk else ""
        return (
            f"needs about {bytes_text(self.memory)} of memory{disk}{time} "
            f"(weights: {'read layer by layer' if self.streamed else 'in memory'})"
        )


class _Stage(NamedTuple):
    """Bytes of memory and of files, and seconds."""

    memory: int = 0
    files: int = 0
    seconds: float = 0.0


class _Forecaster:
    """Computes forecasts of ``job`` for a model in ``dtype``. ``base``: bytes of the process before. ``saves``: whether
    the result is cut and saved. ``run``: whether a layer is run."""

    def __init__(
        self, job: PruneJob | ReplayJob, structure: Structure, dtype: torch.dtype, device: torch.device,
        base: int, *, saves: bool, run: bool,
    ) -> None:  # fmt: skip
        graph = structure.graph
        self.job, self.graph, self.base, self.saves, self.item = job, graph, base, saves, dtype.itemsize
        # Of a number in a matrix product.
        self.product = 2 if dtype == torch.float32 and multiplies_bfloat16_fast(device.type) else self.item
        self.config: Any = structure.config.get_text_config()
        self.hidden, self.vocabulary = int(self.config.hidden_size), int(self.config.vocab_size)
        self.counts = [0] * graph.num_layers
        for name, shape in graph.shapes.items():
            number = graph.layer_of(name)
            if number is not None and name not in graph.ties:
                self.counts[number] += prod(shape)
        self.weights = graph.total_parameters * self.item
        self.samples, self.length = 0, 1
        if job.calibration is not None:
            self.samples, self.length = job.calibration.samples, job.calibration.length_for(structure.config)
        self.tokens = self.samples * self.length
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.signals, self.scored, self.steps, self.predicted = frozenset[Signal](), 0, 1, 0
        if isinstance(job, PruneJob):
            groups = [group for group in scope_of(job, structure).groups(graph) if group.kind != VOCABULARY]
            self.predicted = min(self.tokens, PREDICTED) if VOCABULARY in job.kinds else 0
            self.signals, self.steps = job.criterion.signals, job.steps
            if not self.signals & {Signal.STREAM, Signal.STREAM_BLOCKS}:
                self.shapes = {name: graph.shapes[name] for name in scored_spans(graph, groups, job.criterion)}
            if self.signals - {Signal.WEIGHT, Signal.TOKENS}:
                limited = job.compensation.reads_text and self.signals & GRADIENTS
                self.scored = min(self.tokens, GRADIENT_TOKENS) if limited else self.tokens
        self.left = _left(job, structure)
        self.matrices = {name: shape for name, shape in self.shapes.items() if len(shape) > 1}
        self.micro = self.length * max(1, min(self.samples, TOKENS_AT_ONCE // self.length))
        rows = 1 if Signal.GRAD_SQ in self.signals else TOKENS_WITH_GRADIENTS // self.length
        self.micro_backward = self.length * max(1, min(self.samples, rows))
        self.sample = self._run_layer(structure, dtype, device) if run else self._guess()

    def of(self, streamed: bool) -> Forecast:
        two_layers = 2 * max(self.counts) * self.item
        always = self.weights - sum(self.counts) * self.item + two_layers if streamed else self.weights
        if self.steps > 1:
            always += self.weights  # of a copy that is cut
        written, scores, fits = self._written(), self._scores(), self._fits()
        saving = two_layers // 2 if streamed and self.saves else 0
        files = max(scores.files, fits.files)
        seconds = START + written.seconds + self.steps * scores.seconds + fits.seconds
        seconds += (self._decoded() + 6 if streamed else 1) * self.weights / READ
        if self.saves:
            units = self.graph.by_name
            gone = sum(
                (1 - share) * self.graph.parameters_per_unit(units[name]) * units[name].units
                for name, share in self.left.items()
            )
            files += round(self.weights - min(gone * self.item, self.weights))
            seconds += self.weights / READ
        peak = max(written.memory, scores.memory, fits.memory, saving)
        timed = self.sample.forward_seconds > 0
        return Forecast(streamed, self.base + always + peak, files, seconds if timed else None)

    def _decoded(self) -> int:
        """Decoding steps of the text that the model writes, each of which reads all weights."""
        text = self.job.calibration
        if text is None or not text.text.writes:
            return 0
        passage = min(64, self.length)
        return -(-self.tokens // (passages_at_once(self.config, passage, self.item) * passage)) * passage

    def _written(self) -> _Stage:
        """Reading or writing calibration text."""
        steps, passage = self._decoded(), min(64, self.length)
        if not steps:
            return _Stage(self.tokens * 64)
        rows = min(passages_at_once(self.config, passage, self.item), -(-self.tokens // passage))
        # With autocast, keys are in the model's dtype and values in that of products.
        cache = rows * passage * (cached_bytes(self.config, self.item) + cached_bytes(self.config, self.product)) // 2
        logits = rows * self.vocabulary * F32
        memory = cache + 4 * logits + self.sample.forward_bytes * rows + self.tokens * 64
        return _Stage(round(memory), 0, steps * (self.sample.few_seconds + self._head(rows) + 7 * logits / COPY))

    def _scores(self) -> _Stage:
        """Scoring units, by weights, a walk forwards, or a walk with gradients."""
        sample, scored, matrices = self.sample, self.scored, list(self.matrices.values())
        scoring = 0
        if Signal.WEIGHT in self.signals:
            scoring = max((prod(shape[-2:]) for shape in self.shapes.values()), default=0) * 3 * F32
        seconds = 40 * sum(map(prod, self.shapes.values())) / COPY
        if self.predicted:
            scoring = max(scoring, 3 * self.length * self.vocabulary * F32)
            seconds += sample.forward_seconds * self.predicted + self._head(self.predicted)
        if not scored:
            return _Stage(scoring, 0, seconds)
        seconds += sample.forward_seconds * scored
        if self.signals & GRADIENTS:
            logits = self.micro_backward * self.vocabulary
            if not sample.whole_logits:
                logits = min(logits, max(LOGIT_ELEMENTS, self.vocabulary))
            memory = max(logits * (self.item + 3 * F32), self._gradients() + scoring)
            states = scored * self.hidden * self.item * (self.graph.num_layers + 2)
            seconds += sample.backward_seconds * scored + 2 * self._head(scored)
        else:
            grams, inputs = 0, [shape[-1] for shape in matrices]
            if Signal.GRAM in self.signals:
                grams = self._by_layer({n: prod(s[:-2]) * s[-1] ** 2 * F32 for n, s in self.matrices.items()})
                seconds += sum(map(gram_operations, inputs)) * scored / sample.rate
            each = max(sample.forward_bytes, 3 * self.hidden * F32 + max(inputs, default=0) * (self.product + 12))
            memory = max(round(each * self.micro) + grams, 3 * grams + scoring)
            states = scored * self.hidden * F32 * (self.graph.num_layers if Signal.STREAM_BLOCKS in self.signals else 1)
        return _Stage(memory + min(states, DEFAULT_LIMIT), max(0, states - DEFAULT_LIMIT), seconds)

    def _gradients(self) -> int:
        """Activations of a layer in the backward pass, with its gradients, or with a product and its gradients."""
        activations = round(self.sample.backward_bytes * self.micro_backward)
        if Signal.PRODUCT_GRAD in self.signals:
            shapes = self.matrices.values()
            return activations + F32 * max(prod(s[-2:]) + 5 * self.micro_backward * max(s[-2:]) for s in shapes)
        summed = Signal.GRAD_SQ in self.signals or self.scored > self.micro_backward
        kinds = len(self.signals & {Signal.GRAD, Signal.GRAD_SQ}) if summed else 0
        each = self.item + F32 * (kinds + 0.5 * (self.item != F32 and summed))
        return activations + round(each * self._by_layer({name: prod(s) for name, s in self.shapes.items()}))

    def _fits(self) -> _Stage:
        """A compensation: two walks, and the sums and the solution of each fit."""
        if not (self.saves and self.job.compensation.reads_text and self.tokens):
            return _Stage()
        tokens, sample, item = self.tokens, self.sample, self.item
        count = full = sums = solving = weights = 0
        seconds = 0.0
        for name, share in self.left.items():
            for span in self.graph.by_name[name].spans_with(Role.CONSUMES):
                shape = self.graph.shapes[span.parameter]
                if len(shape) < 2 or span.axis < len(shape) - 2:
                    continue
                inputs, matrices = shape[span.axis], prod(shape[:-2])
                kept, out = max(1, round(inputs * share)), prod(shape[-2:]) // inputs
                count, full = count + 1, max(full, inputs)
                sums = max(sums, 2 * matrices * kept * (kept + out) * F32)
                solving = max(solving, 8 * kept**2 + 20 * kept * out)
                weights += prod(shape) * item
                seconds += tokens * (gram_operations(kept) + 4 * kept * out) / sample.rate
                # In float64, which takes twice as long.
                seconds += matrices * (6 * kept**3 + (24 * min(out, 512) + 2 * out) * 2 * kept**2) / sample.rate
        walks = max(1.0, count / self.graph.num_layers)
        seconds += 2 * walks * sample.forward_seconds * tokens
        states = tokens * (self.hidden * F32 * (3 if walks > 1 else 2) + full * self.product)
        each = max(sample.forward_bytes, self.hidden * 9 * F32 + full * (2 * self.product + F32))
        memory = sums + max(round(self.micro * each), solving) + min(states, DEFAULT_LIMIT)
        return _Stage(memory, max(0, states - DEFAULT_LIMIT) + weights + 4 * tokens * self.hidden * F32, seconds)

    def _by_layer(self, sizes: Mapping[str, int]) -> int:
        """The largest sum of any layer."""
        sums: dict[int | None, int] = {}
        for name, size in sizes.items():
            layer = self.graph.layer_of(name)
            sums[layer] = sums.get(layer, 0) + size
        return max(sums.values(), default=0)

    def _head(self, tokens: float) -> float:
        return 2 * tokens * self.hidden * self.vocabulary / self.sample.rate

    def _guess(self) -> LayerSample:
        """Of a layer that is not run, by its hidden and its widest size."""
        widest = max(shape[0] for name, shape in self.graph.shapes.items() if self.graph.layer_of(name) is not None)
        each = 4 * (self.hidden + widest) * F32
        return LayerSample(each, 3 * each)

    def _run_layer(self, structure: Structure, dtype: torch.dtype, device: torch.device) -> LayerSample:
        trained = sorted(self.shapes) if self.signals & {Signal.GRAD, Signal.GRAD_SQ} else []
        length, backward = self.length if self.tokens else 64, 0
        if self.signals & GRADIENTS:
            backward = length if Signal.GRAD_SQ in self.signals else TOKENS_WITH_GRADIENTS
        path = self.graph.layers
        try:
            return sample_layer(structure.config, path, self.counts, dtype, device, length, trained, backward)
        except Exception as error:  # a forecast must not keep a model from being pruned
            _LOG.debug("no layer of '%s' could be run outside the model: %s", structure.ref, error)
            return self._guess()


def forecast(
    job: PruneJob | ReplayJob,
    structure: Structure,
    opener: Opener,
    max_memory: int | None,
    *,
    saves: bool,
    in_memory: bool,
) -> Forecast:
    """How a prune runs: with all weights in memory where they fit into half of what is free, or all that it takes into
    ``max_memory``; else layer by layer. ``in_memory``: the result stays in memory. A layer is run for it where it is
    shown, or decides. Reads no weights. Raises `SettingsError` where nothing fits."""
    load, loaded = opener.load, structure if isinstance(structure, Model) else None
    resident = psutil.Process().memory_info().rss
    if loaded is None:
        check_device(load.device)
        dtype, device = dtype_of(structure, load), torch.device(load.device)
    else:
        dtype, device = loaded.model.dtype, loaded.model.device
        resident -= 0 if loaded.streamed else sum(p.nbytes for p in loaded.model.parameters())
    run = opener.progress is not QUIET or max_memory is not None
    forecaster = _Forecaster(job, structure, dtype, device, max(resident, 0) + MODULES, saves=saves, run=run)
    if loaded is not None and loaded.streamed is not None:
        return forecaster.of(streamed=True)
    whole = "it is loaded already" if loaded is not None else _why_in_memory(job, saves=saves, in_memory=in_memory)
    whole = whole or why_not_streamed(structure, opener.catalog, load)
    choices = (False,) if whole else (False, True)
    limit: float = inf
    if max_memory is not None:
        limit, name, advice = max_memory, f"--max-memory {bytes_text(max_memory)}", "raise it, or "
    else:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if forecaster.weights * processes > free_memory() // 2:
            choices = choices[-1:]
        if device.type == "cpu":
            limit = psutil.virtual_memory().total + psutil.swap_memory().total
        name, advice = f"this machine has {bytes_text(limit)} of memory", "give --max-memory, or "
    tried = [forecaster.of(streamed) for streamed in choices]
    fitting = next((each for each in tried if each.memory <= limit), None)
    if fitting is None:
        raise SettingsError(
            f"{name}: '{structure.ref}' needs at least {bytes_text(tried[-1].memory)}"
            f"{f', as {whole}' if whole else ''}; {advice}take fewer or shorter samples"
        )
    return fitting


def free_memory() -> int:
    """Bytes of memory that programs can still take."""
    return int(psutil.virtual_memory().available)


def _why_in_memory(job: PruneJob | ReplayJob, *, saves: bool, in_memory: bool) -> str | None:
    """What needs the whole model in memory; None if nothing does."""
    if in_memory:
        return "the result stays in memory"
    if isinstance(job, PruneJob):
        if job.steps > 1:
            return "--steps cuts copies of the model"
        if job.allocation.measures:
            return f"{job.allocation.label()} runs copies of the model"
        if not job.budget.from_shapes:
            return f"{job.budget.label()} measures the model"
    if saves and job.compensation.reads_text and not job.compensation.by_layer:
        return f"{job.compensation.label()} changes weights of the whole model"
    return None


def _left(job: PruneJob | ReplayJob, structure: Structure) -> dict[str, float]:
    """Group name → the share of its units that stays, in equal shares."""
    if isinstance(job, ReplayJob):
        return {name: len(cut.kept) / cut.units for name, cut in job.plan.cuts.items()}
    graph = structure.graph
    groups = scope_of(job, structure).groups(graph)
    saving = sum(graph.parameters_per_unit(group) * group.units for group in groups) or 1
    removed = {
        "units": job.amount,
        "ratio": job.amount * graph.decoder_parameters / saving,
        "parameters": (graph.total_parameters - job.amount) / saving,
        "tokens": 1 - job.amount / groups[0].units,
    }[job.by]
    return {group.name: 1 - min(max(removed, 0.0), 1.0) for group in groups}
