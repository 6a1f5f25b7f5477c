"""What a prune will take: peak memory and disk within a quarter, time within half. By it, weights are loaded as a whole
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
from typing import TYPE_CHECKING, Any

import torch

from ..engine.boundaries import DEFAULT_LIMIT
from ..engine.execution import TOKENS_AT_ONCE, TOKENS_WITH_GRADIENTS
from ..engine.memory import (
    MODULES,
    LayerSample,
    duration,
    free_memory,
    gram_operations,
    layer_parameters,
    machine_memory,
    memory_before,
    sample_layer,
    size_text,
)
from ..engine.signals import GRADIENTS, Signal, positions
from ..errors import SettingsError
from ..models.model import Model
from ..models.numbers import check_device, dtype_of, multiplies_bfloat16_fast
from ..models.opening import why_not_streamed
from ..models.positions import LOGIT_ELEMENTS
from ..structure.coupling import Role
from .choice import GRADIENT_TOKENS
from .compensation.choose import can_wait
from .criteria.estimate import scored_parameters
from .job import PruneJob, ReplayJob
from .targets import scope_of

if TYPE_CHECKING:
    from ..models.model import Structure
    from ..plugins.catalog import Catalog
    from ..settings import LoadSettings

_LOG = logging.getLogger("llmpruner")
F32, F64 = 4, 8
READ = 1e9
"""Bytes per second of weights that are read."""
START = 3.0
"""Seconds for building the model, its tokenizer, and the checks of a save."""


@dataclass(frozen=True)
class Forecast:
    """How a prune runs, and what it takes so. ``streamed``: weights are read layer by layer. ``state_memory``: bytes of
    hidden states in memory. ``divided``: micro-batches are this many times smaller. ``memory``: largest resident bytes;
    ``disk``: bytes that are written; ``seconds``: None where no layer could be timed."""

    streamed: bool = False
    state_memory: int = DEFAULT_LIMIT
    divided: int = 1
    memory: int = 0
    disk: int = 0
    seconds: float | None = None

    def as_json(self) -> dict[str, Any]:
        """JSON values: bytes and seconds."""
        seconds = None if self.seconds is None else round(self.seconds, 1)
        return {"memory": self.memory, "disk": self.disk, "seconds": seconds, "streamed": self.streamed}

    def __str__(self) -> str:
        time = "" if self.seconds is None else f" and {duration(self.seconds)}"
        disk = f", {size_text(self.disk)} of disk" if self.disk else ""
        how = "read layer by layer" if self.streamed else "in memory"
        how += f", micro-batches {self.divided} times smaller" if self.divided > 1 else ""
        return f"needs about {size_text(self.memory)} of memory{disk}{time} (weights: {how})"


class Forecaster:
    """Computes forecasts of ``job`` for a model in ``dtype``. ``sample``: None where no layer could be run; activations
    are estimated from widths then. ``base``: bytes of the process before. ``mixed``: whether products are in bfloat16.
    ``saves``: whether the result is cut and saved."""

    def __init__(
        self, job: PruneJob | ReplayJob, structure: Structure, dtype: torch.dtype, sample: LayerSample | None,
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
        self.left, self.signals, self.names = _left(job, structure), frozenset[Signal](), list[str]()
        self.scored = 0
        if isinstance(job, PruneJob):
            groups = scope_of(job, structure).groups(self.graph)
            self.signals = job.criterion.signals
            waits = job.compensation.ranks_again and job.allocation.equal_shares and job.steps == 1
            chooses = saves and waits and can_wait(job.criterion, self.graph, groups)
            if not self.signals & {Signal.STREAM, Signal.STREAM_BLOCKS}:
                self.names = sorted(scored_parameters(self.graph, groups, job.criterion))
            if self.signals - {Signal.WEIGHT} and not chooses:
                limited = job.compensation.ranks_again and self.signals & GRADIENTS
                self.scored = min(self.tokens, GRADIENT_TOKENS) if limited else self.tokens

    def of(self, streamed: bool, state_memory: int = DEFAULT_LIMIT, divided: int = 1) -> Forecast:
        """The forecast for one way to run."""
        self.micro = self.length * max(1, min(self.samples, TOKENS_AT_ONCE // divided // self.length))
        rows = 1 if Signal.GRAD_SQ in self.signals else TOKENS_WITH_GRADIENTS // divided // self.length
        self.micro_backward = self.length * max(1, min(self.samples, rows))
        layers = sum(self.counts) * self.item
        always = self.weights - layers + 2 * max(self.counts) * self.item if streamed else self.weights
        stages = [self._written(), self._scores(state_memory), self._fits(state_memory)]
        peak = max(memory for memory, _, _ in stages)
        steps = self.job.steps if isinstance(self.job, PruneJob) else 1
        always += self.weights if steps > 1 else 0
        kept = self.left.get("", 1.0) if self.saves else 0.0
        disk = round(self.weights * kept) + max(files for _, files, _ in stages)
        seconds = None
        if self.sample is not None:
            times = [time for _, _, time in stages]
            walks = self._decoded() + 6 if streamed else 1
            copies = 4 * self.weights / self.sample.copy if self.saves else 0.0
            seconds = START + walks * self.weights / READ + copies + times[0] + steps * times[1] + times[2]
        peak = max(peak, max(self.counts) * self.item if streamed and self.saves else 0)
        return Forecast(streamed, state_memory, divided, self.base + always + peak, disk, seconds)

    def _decoded(self) -> int:
        """Decoding steps of the text that the model writes, each of which reads all weights."""
        text = self.job.calibration
        passage = min(64, self.length)
        return 0 if text is None or not text.text.writes else -(-self.tokens // (64 * passage)) * passage

    def _written(self) -> tuple[int, int, float]:
        """Memory, files and seconds of writing calibration text, 64 passages at a time."""
        if not self._decoded():
            return self.tokens * 64, 0, 0.0
        rows = min(64, -(-self.tokens // min(64, self.length)))
        heads = _number(self.config, "num_attention_heads", 1)
        width = _number(self.config, "head_dim", self.hidden // heads) * _number(
            self.config, "num_key_value_heads", heads
        )
        cache = rows * min(64, self.length) * width * (self.item + self.product) * (self.graph.num_layers + 1)
        memory = cache + 4 * rows * self.vocabulary * F32 + self._activations(rows) + self.tokens * 64
        if self.sample is None:
            return memory, 0, 0.0
        step = self._forward(rows, 1) + self._head(rows) + 7 * rows * self.vocabulary * F32 / self.sample.copy + 2e-3
        return memory, 0, self._decoded() * step

    def _scores(self, state_memory: int) -> tuple[int, int, float]:
        """The same of scoring units."""
        shapes = {name: self.graph.shapes[name] for name in self.names}
        matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
        largest = max((prod(shape[-2:]) for shape in shapes.values()), default=0)
        scoring = largest * (3 * F32) if Signal.WEIGHT in self.signals else 0
        elements = sum(map(prod, shapes.values()))
        if not self.scored:
            return scoring, 0, 0.0 if self.sample is None else 40 * elements / self.sample.copy
        gradients = bool(self.signals & GRADIENTS)
        copies = self.graph.num_layers if {Signal.STREAM_BLOCKS} & self.signals else 1
        states = self.scored * self.hidden * (self.item * (self.graph.num_layers + 2) if gradients else F32 * copies)
        grams = self._by_layer({n: prod(s[:-2]) * s[-1] ** 2 for n, s in matrices.items()})
        grams *= F32 if Signal.GRAM in self.signals else 0
        if gradients:
            memory = max(self._logits() * (self.item + 3 * F32), self._gradients(shapes, matrices) + scoring)
        else:
            widest = max((shape[-1] for shape in matrices.values()), default=0)
            watched = self.micro * (3 * self.hidden * F32 + widest * (self.product + F32 + F64))
            memory = max(max(self._activations(self.micro), watched) + grams, 3 * grams + scoring)
        files = max(0, states - state_memory)
        memory += min(states, state_memory)
        if self.sample is None:
            return memory, files, 0.0
        copied = 40 * elements + sum(shape[-1] for shape in matrices.values()) * self.scored * 2 * (F32 + F64)
        time = self._forward(self.scored, self.scored / self.micro) + copied / self.sample.copy
        if Signal.GRAM in self.signals:
            time += sum(gram_operations(shape[-1]) for shape in matrices.values()) * self.scored / self.sample.gram
        if gradients:
            time += self.sample.backward_seconds * self.scored * sum(self.counts) / self.sample.parameters
            time += 2 * self._head(self.scored) + 6 * self.scored * self.vocabulary * F32 / self.sample.copy
            time += elements * F32 * 2 * (self.scored / self.micro_backward) / self.sample.copy
        return memory, files, time

    def _logits(self) -> int:
        every = self.micro_backward * self.vocabulary
        whole = self.sample is not None and self.sample.whole_logits
        return every if whole else min(every, max(LOGIT_ELEMENTS, self.vocabulary))

    def _gradients(self, shapes: Mapping[str, tuple[int, ...]], matrices: Mapping[str, tuple[int, ...]]) -> int:
        """Activations of a layer in the backward pass, with its gradients, or with its products and their sums."""
        activations = self._activations(self.micro_backward, backward=True)
        if Signal.PRODUCT_GRAD not in self.signals:
            summed = Signal.GRAD_SQ in self.signals or self.scored > self.micro_backward
            kinds = len(self.signals & {Signal.GRAD, Signal.GRAD_SQ}) if summed else 0
            each = self.item + F32 * (kinds + 0.5 * (self.item != F32 and summed))
            return activations + round(each * self._by_layer({name: prod(shape) for name, shape in shapes.items()}))
        where, sizes = positions(self.graph), dict[str, int]()
        for name, shape in matrices.items():
            heads = where[name].reads & {"attention", "query"}
            numbers = prod(shape[:-2]) * (shape[-1] + (shape[-1] ** 2 if heads else 0))
            chosen = _number(self.config, "num_experts_per_tok", 1) if len(shape) > 2 else 1
            sizes[name] = self.micro_backward * chosen * (shape[-1] + shape[-2]) * F32 + numbers * F64
        one = max(
            (4 * self.micro_backward * max(s[-2:]) * F32 + prod(s[-2:]) * F32 for s in matrices.values()), default=0
        )
        return activations + self._by_layer(sizes) + one

    def _fits(self, state_memory: int) -> tuple[int, int, float]:
        """The same of a compensation: two walks, and the sums and the solution of each fit."""
        if not (self.saves and self.job.compensation.reads_text and self.tokens):
            return 0, 0, 0.0
        fits = list(self._consumers())
        full = max((inputs for inputs, _, _, _ in fits), default=0)
        states = 2 * self.tokens * self.hidden * F32 + self.tokens * full * self.product
        states += self.tokens * self.hidden * F32 if len(fits) > self.graph.num_layers else 0
        sums = max((2 * m * kept * (kept + out) * F32 for _, kept, out, m in fits), default=0)
        solving = max((8 * kept**2 + 20 * kept * out for _, kept, out, _ in fits), default=0)
        rows = self.micro * (self.hidden * 9 * F32 + full * (2 * self.product + F32))
        memory = sums + max(rows, self._activations(self.micro), solving if self.job.compensation.ranks_again else 0)
        files = max(0, states - state_memory) + sum(inputs * out * m for inputs, _, out, m in fits) * self.item
        files += 4 * self.tokens * self.hidden * F32
        time = 0.0
        if self.sample is not None:
            walks = max(1.0, len(fits) / self.graph.num_layers) * 2
            time = walks * self._forward(self.tokens, self.tokens / self.micro)
            for _, kept, out, matrices in fits:
                time += self.tokens * gram_operations(kept) / self.sample.gram
                time += self.tokens * 4 * kept * out / self.sample.head
                tried = min(out, 512)
                time += matrices * (3 * kept**3 + (12 * tried + out) * 2 * kept**2) / self.sample.solve
        return memory + min(states, state_memory), files, time

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

    def _activations(self, tokens: int, *, backward: bool = False) -> int:
        if self.sample is not None:
            return round(tokens * (self.sample.backward_bytes if backward else self.sample.forward_bytes))
        widest = max((s[0] for name, s in self.graph.shapes.items() if self.graph.layer_of(name) == 0), default=0)
        return tokens * 4 * (self.hidden + widest) * F32 * (3 if backward else 1)

    def _forward(self, tokens: float, runs: float) -> float:
        """Seconds of all layers."""
        assert self.sample is not None
        seconds = self.sample.run_seconds * max(runs, 1) + self.sample.forward_seconds * tokens
        return seconds * sum(self.counts) / self.sample.parameters

    def _head(self, tokens: float) -> float:
        assert self.sample is not None
        return 2 * tokens * self.hidden * self.vocabulary / self.sample.head


def forecast(
    job: PruneJob | ReplayJob,
    structure: Structure,
    load: LoadSettings,
    catalog: Catalog,
    max_memory: int | None,
    *,
    saves: bool,
    in_memory: bool,
    timed: bool,
) -> Forecast:
    """How a prune runs: with all weights in memory where they fit into half of what is free, or all that it takes into
    ``max_memory``; else layer by layer. ``in_memory``: the result stays in memory. ``timed``: whether a layer is run
    for it. Reads no weights. Raises
    `SettingsError` where nothing fits."""
    whole = "the result stays in memory" if in_memory else _why_whole(job, saves=saves)
    if isinstance(structure, Model):
        whole = "it is loaded already"
        dtype, device = structure.model.dtype, structure.model.device
    else:
        check_device(load.device)
        dtype, device = dtype_of(structure, load), torch.device(load.device)
    base = memory_before(structure.model if isinstance(structure, Model) and structure.streamed is None else None)
    sample = _sample(job, structure, dtype, device) if timed or max_memory is not None else None
    mixed = dtype == torch.float32 and multiplies_bfloat16_fast(device.type)
    expected = Forecaster(job, structure, dtype, sample, base + MODULES, mixed=mixed, saves=saves)
    if isinstance(structure, Model) and structure.streamed is not None:
        return expected.of(streamed=True)
    whole = whole or why_not_streamed(structure, catalog, load)
    if max_memory is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        large = structure.graph.total_parameters * dtype.itemsize * processes > free_memory() // 2
        found = expected.of(streamed=large and whole is None)
        if device.type == "cpu" and found.memory > machine_memory():
            raise SettingsError(
                f"'{structure.ref}' needs about {size_text(found.memory)} of memory, and this machine has "
                f"{size_text(machine_memory())}; take fewer or shorter samples, or give --max-memory"
            )
        return found
    ways = [(streamed, limit, 1) for streamed in (False, True) for limit in (DEFAULT_LIMIT, 0)]
    ways += [(True, 0, divided) for divided in (2, 4, 8, 16)]
    tried = [expected.of(*way) for way in ways if whole is None or not way[0]]
    for found in tried:
        if found.memory <= max_memory:
            return found
    raise SettingsError(
        f"--max-memory {size_text(max_memory)}: '{structure.ref}' needs at least "
        f"{size_text(min(found.memory for found in tried))}{f', as {whole}' if whole else ''}; raise it, or take fewer "
        "or shorter samples"
    )


def _why_whole(job: PruneJob | ReplayJob, *, saves: bool) -> str | None:
    """What needs the whole model in memory; None if nothing does."""
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
    job: PruneJob | ReplayJob, structure: Structure, dtype: torch.dtype, device: torch.device
) -> LayerSample | None:
    """None where no layer can be run on its own."""
    trained: list[str] = []
    if isinstance(job, PruneJob) and job.criterion.signals & {Signal.GRAD, Signal.GRAD_SQ}:
        groups = scope_of(job, structure).groups(structure.graph)
        trained = sorted(scored_parameters(structure.graph, groups, job.criterion))
    length = 64 if job.calibration is None else job.calibration.length_for(structure.config)
    try:
        return sample_layer(structure.config, structure.graph, dtype, device, length, trained)
    except Exception as error:  # a forecast must not keep a model from being pruned
        _LOG.debug("no layer of '%s' could be run on its own: %s", structure.ref, error)
        return None


def _left(job: PruneJob | ReplayJob, structure: Structure) -> dict[str, float]:
    """Group name → the share of its units that stays, in equal shares; under "" the share of all parameters."""
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
    return {**left, "": 1 - min(gone / graph.total_parameters, 1.0)}


def _number(config: Any, name: str, default: int) -> int:
    """A field of the configuration; ``default`` where it has none, or one for each layer."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else default
