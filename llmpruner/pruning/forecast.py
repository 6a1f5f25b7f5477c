"""What a prune will take: peak memory and disk within a quarter, time within half. By it, weights are loaded in memory
or read layer by layer.

Memory is that of the process, the weights (or two layers of them), the hidden states up to their limit, and what the
largest stage needs: logits of text that is written, gradients or statistics of one layer, or the sums of one fit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch

from ..engine.boundaries import DEFAULT_LIMIT
from ..engine.execution import TOKENS_AT_ONCE, TOKENS_WITH_GRADIENTS
from ..engine.memory import LayerSample, gram_operations, guessed_layer, layer_parameters, sample_layer
from ..engine.signals import GRADIENTS, Signal, positions
from ..errors import SettingsError
from ..models.model import Model
from ..models.numbers import check_device, dtype_of, multiplies_bfloat16_fast
from ..models.opening import why_not_streamed
from ..models.positions import LOGIT_ELEMENTS
from ..progress import QUIET
from ..structure.coupling import Role
from ..values import bytes_text
from .criteria.estimate import scored_parameters
from .job import PruneJob, ReplayJob
from .selection import GRADIENT_TOKENS
from .targets import scope_of

if TYPE_CHECKING:
    from ..discovery.opening import Opener
    from ..models.model import Structure

_LOG = logging.getLogger("llmpruner")
F32, F64 = 4, 8
MODULES = 96 << 20
"""Bytes of modules that are imported during the work, of the tokenizer, and of the allocator's free lists."""
READ = 1e9
"""Bytes per second of weights that are read."""
START = 3.0
"""Seconds for building the model, its tokenizer, and the checks of a save."""


@dataclass(frozen=True)
class Forecast:
    """``streamed``: weights are read layer by layer. ``state_memory``: bytes of hidden states in memory. ``memory``:
    largest resident bytes; ``disk``: bytes that are written; ``seconds``: None where no layer could be timed."""

    streamed: bool
    state_memory: int
    memory: int
    disk: int
    seconds: float | None

    def as_json(self) -> dict[str, Any]:
        """JSON values: bytes and seconds."""
        seconds = None if self.seconds is None else round(self.seconds, 1)
        return {"memory": self.memory, "disk": self.disk, "seconds": seconds, "streamed": self.streamed}

    def __str__(self) -> str:
        time = "" if self.seconds is None else f" and {_duration(self.seconds)}"
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


class Forecaster:
    """Computes forecasts of ``job`` for a model in ``dtype``. ``base``: bytes of the process before. ``mixed``: whether
    products are in bfloat16. ``saves``: whether the result is cut and saved."""

    def __init__(
        self, job: PruneJob | ReplayJob, structure: Structure, dtype: torch.dtype, sample: LayerSample,
        base: int, *, mixed: bool, saves: bool,
    ) -> None:  # fmt: skip
        self.job, self.graph, self.sample, self.base, self.saves = job, structure.graph, sample, base, saves
        self.item, self.product = dtype.itemsize, 2 if mixed else dtype.itemsize
        self.config: Any = structure.config.get_text_config()
        self.hidden, self.vocabulary = int(self.config.hidden_size), int(self.config.vocab_size)
        self.counts = layer_parameters(self.graph)
        self.weights = self.graph.total_parameters * self.item
        text, self.samples, self.length = job.calibration, 0, 1
        if text is not None:
            self.samples, self.length = text.samples, text.length_for(structure.config)
        self.tokens = self.samples * self.length
        self.left, self.kept = _left(job, structure)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.signals, self.scored, self.steps = frozenset[Signal](), 0, 1
        if isinstance(job, PruneJob):
            groups = scope_of(job, structure).groups(self.graph)
            self.signals, self.steps = job.criterion.signals, job.steps
            if not self.signals & {Signal.STREAM, Signal.STREAM_BLOCKS}:
                self.shapes = {n: self.graph.shapes[n] for n in scored_parameters(self.graph, groups, job.criterion)}
            if self.signals - {Signal.WEIGHT}:
                limited = job.compensation.reads_text and self.signals & GRADIENTS
                self.scored = min(self.tokens, GRADIENT_TOKENS) if limited else self.tokens
        self.matrices = {name: shape for name, shape in self.shapes.items() if len(shape) > 1}
        self.micro = self.length * max(1, min(self.samples, TOKENS_AT_ONCE // self.length))
        rows = 1 if Signal.GRAD_SQ in self.signals else TOKENS_WITH_GRADIENTS // self.length
        self.micro_backward = self.length * max(1, min(self.samples, rows))

    def of(self, *, streamed: bool, state_memory: int = DEFAULT_LIMIT) -> Forecast:
        two_layers = 2 * max(self.counts) * self.item
        always = self.weights - sum(self.counts) * self.item + two_layers if streamed else self.weights
        if self.steps > 1:
            always += self.weights  # of a copy that is cut
        written, scores, fits = self._written(), self._scores(state_memory), self._fits(state_memory)
        saving = two_layers // 2 if streamed and self.saves else 0
        peak = max(written.memory, scores.memory, fits.memory, saving)
        saved = round(self.weights * self.kept) if self.saves else 0
        reads = (self._decoded() + 6 if streamed else 1) * self.weights
        seconds = START + reads / READ + written.seconds + self.steps * scores.seconds + fits.seconds
        seconds += 4 * self.weights / self.sample.copy if self.saves else 0
        return Forecast(
            streamed, state_memory, self.base + always + peak, saved + max(scores.files, fits.files),
            seconds if self.sample.timed else None,
        )  # fmt: skip

    def _decoded(self) -> int:
        """Decoding steps of the text that the model writes, each of which reads all weights."""
        text = self.job.calibration
        passage = min(64, self.length)
        return 0 if text is None or not text.text.writes else -(-self.tokens // (64 * passage)) * passage

    def _written(self) -> _Stage:
        """Writing calibration text, 64 passages at a time."""
        if not self._decoded():
            return _Stage(self.tokens * 64)
        rows = min(64, -(-self.tokens // min(64, self.length)))
        heads = self._number("num_attention_heads", 1)
        width = self._number("head_dim", self.hidden // heads) * self._number("num_key_value_heads", heads)
        cache = rows * min(64, self.length) * width * (self.item + self.product) * (self.graph.num_layers + 1)
        logits = rows * self.vocabulary * F32
        step = self._forward(rows, 1) + self._head(rows) + 7 * logits / self.sample.copy
        activations = self.sample.forward_bytes * rows
        return _Stage(round(cache + 4 * logits + activations + self.tokens * 64), 0, self._decoded() * step)

    def _scores(self, state_memory: int) -> _Stage:
        """Scoring units, by weights, a walk forwards, or a walk with gradients."""
        largest = max((prod(shape[-2:]) for shape in self.shapes.values()), default=0)
        scoring = largest * 3 * F32 if Signal.WEIGHT in self.signals else 0
        elements = sum(map(prod, self.shapes.values()))
        if not self.scored:
            return _Stage(scoring, 0, 40 * elements / self.sample.copy)
        gradients = bool(self.signals & GRADIENTS)
        copies = self.graph.num_layers if Signal.STREAM_BLOCKS in self.signals else 1
        states = self.scored * self.hidden * (self.item * (self.graph.num_layers + 2) if gradients else F32 * copies)
        if gradients:
            memory = max(self._logits() * (self.item + 3 * F32), self._gradients() + scoring)
        else:
            widest = max((shape[-1] for shape in self.matrices.values()), default=0)
            watched = self.micro * (3 * self.hidden * F32 + widest * (self.product + F32 + F64))
            grams = self._by_layer({n: prod(s[:-2]) * s[-1] ** 2 * F32 for n, s in self.matrices.items()})
            grams = grams if Signal.GRAM in self.signals else 0
            memory = max(max(round(self.sample.forward_bytes * self.micro), watched) + grams, 3 * grams + scoring)
        inputs = [shape[-1] for shape in self.matrices.values()]
        seconds = self._forward(self.scored, self.scored / self.micro)
        seconds += (40 * elements + sum(inputs) * self.scored * 2 * (F32 + F64)) / self.sample.copy
        if Signal.GRAM in self.signals:
            seconds += sum(map(gram_operations, inputs)) * self.scored / self.sample.gram
        if gradients:
            seconds += self.sample.backward_seconds * self.scored * sum(self.counts) / self.sample.parameters
            seconds += 2 * self._head(self.scored) + 6 * self.scored * self.vocabulary * F32 / self.sample.copy
            seconds += elements * F32 * 2 * (self.scored / self.micro_backward) / self.sample.copy
        return _Stage(memory + min(states, state_memory), max(0, states - state_memory), seconds)

    def _logits(self) -> int:
        every = self.micro_backward * self.vocabulary
        return every if self.sample.whole_logits else min(every, max(LOGIT_ELEMENTS, self.vocabulary))

    def _gradients(self) -> int:
        """Activations of a layer in the backward pass, with its gradients, or with its products and their sums."""
        activations = round(self.sample.backward_bytes * self.micro_backward)
        if Signal.PRODUCT_GRAD not in self.signals:
            summed = Signal.GRAD_SQ in self.signals or self.scored > self.micro_backward
            kinds = len(self.signals & {Signal.GRAD, Signal.GRAD_SQ}) if summed else 0
            each = self.item + F32 * (kinds + 0.5 * (self.item != F32 and summed))
            return activations + round(each * self._by_layer({name: prod(s) for name, s in self.shapes.items()}))
        where, sizes, largest = positions(self.graph), dict[str, int](), 0
        for name, shape in self.matrices.items():
            heads = where[name].reads & {"attention", "query"}
            numbers = prod(shape[:-2]) * (shape[-1] + (shape[-1] ** 2 if heads else 0))
            chosen = self._number("num_experts_per_tok", 1) if len(shape) > 2 else 1
            sizes[name] = self.micro_backward * chosen * (shape[-1] + shape[-2]) * F32 + numbers * F64
            largest = max(largest, 4 * self.micro_backward * max(shape[-2:]) * F32 + prod(shape[-2:]) * F32)
        return activations + self._by_layer(sizes) + largest

    def _fits(self, state_memory: int) -> _Stage:
        """A compensation: two walks, and the sums and the solution of each fit."""
        if not (self.saves and self.job.compensation.reads_text and self.tokens):
            return _Stage()
        fits = list(self._consumers())
        full = max((inputs for inputs, _, _, _ in fits), default=0)
        states = self.tokens * (2 * self.hidden * F32 + full * self.product)
        states += self.tokens * self.hidden * F32 if len(fits) > self.graph.num_layers else 0
        sums = max((2 * m * kept * (kept + out) * F32 for _, kept, out, m in fits), default=0)
        solving = max((8 * kept**2 + 20 * kept * out for _, kept, out, _ in fits), default=0)
        rows = self.micro * (self.hidden * 9 * F32 + full * (2 * self.product + F32))
        rows = max(rows, round(self.sample.forward_bytes * self.micro))
        memory = sums + max(rows, solving)
        files = max(0, states - state_memory) + sum(inputs * out * m for inputs, _, out, m in fits) * self.item
        files += 4 * self.tokens * self.hidden * F32
        walks = 2 * max(1.0, len(fits) / self.graph.num_layers)
        seconds = walks * self._forward(self.tokens, self.tokens / self.micro)
        for _, kept, out, matrices in fits:
            seconds += self.tokens * (gram_operations(kept) / self.sample.gram + 4 * kept * out / self.sample.head)
            seconds += matrices * (3 * kept**3 + (12 * min(out, 512) + out) * 2 * kept**2) / self.sample.solve
        return _Stage(memory + min(states, state_memory), files, seconds)

    def _consumers(self) -> Iterator[tuple[int, int, int, int]]:
        """Inputs, kept inputs, outputs and number of matrices of every weight that reads removed units."""
        for name, left in self.left.items():
            group = self.graph.by_name.get(name)
            for span in group.spans_with(Role.CONSUMES) if group is not None else ():
                shape = self.graph.shapes[span.parameter]
                if len(shape) > 1 and span.axis >= len(shape) - 2:
                    inputs, outputs = shape[span.axis], prod(shape[-2:]) // shape[span.axis]
                    yield inputs, max(1, round(inputs * left)), outputs, prod(shape[:-2])

    def _by_layer(self, sizes: Mapping[str, int]) -> int:
        """The largest sum of any layer."""
        sums: dict[int | None, int] = {}
        for name, size in sizes.items():
            layer = self.graph.layer_of(name)
            sums[layer] = sums.get(layer, 0) + size
        return max(sums.values(), default=0)

    def _forward(self, tokens: float, runs: float) -> float:
        """Seconds of all layers."""
        seconds = self.sample.run_seconds * max(runs, 1) + self.sample.forward_seconds * tokens
        return seconds * sum(self.counts) / self.sample.parameters

    def _head(self, tokens: float) -> float:
        return 2 * tokens * self.hidden * self.vocabulary / self.sample.head

    def _number(self, name: str, default: int) -> int:
        """A field of the configuration; ``default`` where it has none, or one for each layer."""
        try:
            value = getattr(self.config, name, None)
        except RuntimeError:  # transformers refuses to read it where layers differ
            return default
        return value if isinstance(value, int) else default


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
    if loaded is None:
        check_device(load.device)
    dtype, device = dtype_of(structure, load), torch.device(load.device)
    resident = psutil.Process().memory_info().rss
    if loaded is not None:
        dtype, device = loaded.model.dtype, loaded.model.device
        resident -= 0 if loaded.streamed else sum(p.nbytes for p in loaded.model.parameters())
    run = opener.progress is not QUIET or max_memory is not None
    sample = _sample(job, structure, dtype, device, run=run)
    mixed = dtype == torch.float32 and multiplies_bfloat16_fast(device.type)
    forecaster = Forecaster(job, structure, dtype, sample, max(resident, 0) + MODULES, mixed=mixed, saves=saves)
    if loaded is not None and loaded.streamed is not None:
        return forecaster.of(streamed=True)
    whole = "it is loaded already" if loaded is not None else _why_in_memory(job, saves=saves, in_memory=in_memory)
    whole = whole or why_not_streamed(structure, opener.catalog, load)
    if max_memory is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        large = structure.graph.total_parameters * dtype.itemsize * processes > free_memory() // 2
        result = forecaster.of(streamed=large and whole is None)
        machine = psutil.virtual_memory().total + psutil.swap_memory().total
        if device.type == "cpu" and result.memory > machine:
            raise SettingsError(
                f"'{structure.ref}' needs about {bytes_text(result.memory)} of memory, and this machine has "
                f"{bytes_text(machine)}; take fewer or shorter samples, or give --max-memory"
            )
        return result
    tried = [
        forecaster.of(streamed=streamed, state_memory=limit)
        for streamed in ((False, True) if whole is None else (False,))
        for limit in (DEFAULT_LIMIT, 0)
    ]
    fitting = next((each for each in tried if each.memory <= max_memory), None)
    if fitting is None:
        raise SettingsError(
            f"--max-memory {bytes_text(max_memory)}: '{structure.ref}' needs at least {bytes_text(tried[-1].memory)}"
            f"{f', as {whole}' if whole else ''}; raise it, or take fewer or shorter samples"
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


def _sample(
    job: PruneJob | ReplayJob, structure: Structure, dtype: torch.dtype, device: torch.device, *, run: bool
) -> LayerSample:
    graph = structure.graph
    if run:
        length = 64 if job.calibration is None else job.calibration.length_for(structure.config)
        trained: list[str] = []
        tokens = 0
        if isinstance(job, PruneJob) and job.criterion.signals & GRADIENTS:
            tokens = length if Signal.GRAD_SQ in job.criterion.signals else TOKENS_WITH_GRADIENTS
            if job.criterion.signals & {Signal.GRAD, Signal.GRAD_SQ}:
                trained = sorted(scored_parameters(graph, scope_of(job, structure).groups(graph), job.criterion))
        try:
            return sample_layer(structure.config, graph, dtype, device, length, trained, tokens)
        except Exception as error:  # a forecast must not keep a model from being pruned
            _LOG.debug("no layer of '%s' could be run outside the model: %s", structure.ref, error)
    return guessed_layer(graph, int(structure.config.get_text_config().hidden_size))


def _left(job: PruneJob | ReplayJob, structure: Structure) -> tuple[dict[str, float], float]:
    """Group name → the share of its units that stays, in equal shares; and the share of all parameters."""
    graph = structure.graph
    if isinstance(job, ReplayJob):
        left = {name: len(cut.kept) / cut.units for name, cut in job.plan.cuts.items()}
    else:
        groups = scope_of(job, structure).groups(graph)
        saving = sum(graph.parameters_per_unit(group) * group.units for group in groups) or 1
        removed = {
            "units": job.amount,
            "ratio": job.amount * graph.decoder_parameters / saving,
            "parameters": (graph.total_parameters - job.amount) / saving,
        }[job.by]
        left = {group.name: 1 - min(max(removed, 0.0), 1.0) for group in groups}
    gone = sum(
        (1 - share) * graph.parameters_per_unit(graph.by_name[n]) * graph.by_name[n].units for n, share in left.items()
    )
    return left, 1 - min(gone / graph.total_parameters, 1.0)


def _duration(seconds: float) -> str:
    """``40 s``, ``3 min`` or ``2.5 h``."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
