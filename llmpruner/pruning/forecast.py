"""What a prune will take: peak memory within a quarter, and disk. It decides whether weights are loaded in memory or
read layer by layer.

Memory is that of the process, the weights (or two layers of them), and the largest stage: its hidden states up to their
limit, and logits of text that is written, gradients or statistics of one layer, a trial cut, or the sums of one fit.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, prod
from typing import Any, NamedTuple

import psutil
import torch

from ..calibration.written import passages_at_once
from ..discovery.opening import Opener
from ..engine.boundaries import DEFAULT_LIMIT
from ..engine.execution import TOKENS_AT_ONCE, TOKENS_WITH_GRADIENTS
from ..engine.signals import GRADIENTS, Signal
from ..errors import ModelError, SettingsError
from ..models.generation import LOGIT_ELEMENTS, cached_bytes
from ..models.model import Model, Structure
from ..models.numbers import check_device, dtype_of, multiplies_bfloat16_fast
from ..models.opening import why_not_streamed
from ..structure.coupling import VOCABULARY, Role
from ..values import bytes_text
from .criteria.estimate import scored_spans
from .job import Job, PruneJob, ReplayJob
from .selection import GRADIENT_TOKENS, TRIED, scope_of

F32 = 4
MODULES = 96 << 20
"""Bytes of modules that are imported during the work, of the tokenizer, and of the allocator's free lists."""


@dataclass(frozen=True)
class Forecast:
    """``streamed``: weights are read layer by layer. ``memory``: largest resident bytes; ``disk``: bytes written."""

    streamed: bool
    memory: int
    disk: int

    def __str__(self) -> str:
        disk = f" and {bytes_text(self.disk)} of disk" if self.disk else ""
        weights = "read layer by layer" if self.streamed else "in memory"
        return f"needs about {bytes_text(self.memory)} of memory{disk} (weights: {weights})"


def forecast(
    job: Job, structure: Structure, opener: Opener, max_memory: int | None, *, saves: bool, in_memory: bool
) -> Forecast:
    """The forecast with all weights in memory, where they fit into half of the free memory, or the whole run into
    ``max_memory``; else layer by layer. ``saves``: the model is cut; ``in_memory``: the result stays in memory. Raises
    `SettingsError` where neither fits, and `ModelError` for a streamed model whose weights are needed in memory."""
    process = psutil.Process().memory_info().rss
    loaded = structure if isinstance(structure, Model) else None
    if loaded is None:
        check_device(opener.load.device)
        dtype, device = dtype_of(structure, opener.load), torch.device(opener.load.device).type
    else:
        dtype, device = loaded.model.dtype, loaded.model.device.type
        process -= 0 if loaded.streamed else sum(p.nbytes for p in loaded.model.parameters())
    process = max(process, 0) + MODULES
    sizes = _Sizes(job, structure, dtype, device, saves)
    if loaded is not None and loaded.streamed is not None:
        if _why_in_memory(job, saves) or (saves and job.compensation.reads_text):
            raise ModelError(f"'{structure.ref}' is read layer by layer; pass its folder")
        return sizes.forecast(True, process)
    whole: str | None = "it is loaded already"
    if loaded is None:
        whole = "the result stays in memory" if in_memory else _why_in_memory(job, saves) or why_not_streamed(structure)
    choices = [sizes.forecast(streamed, process) for streamed in ((False,) if whole else (False, True))]
    limit: float = inf
    if max_memory is not None:
        limit, name, advice = max_memory, f"--max-memory {bytes_text(max_memory)}", "raise it, or "
    else:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if sizes.weights * processes > free_memory() // 2:
            choices = choices[-1:]
        if device == "cpu":
            limit = psutil.virtual_memory().total + psutil.swap_memory().total
        name, advice = f"this machine has {bytes_text(limit)} of memory", "give --max-memory, or "
    fitting = next((choice for choice in choices if choice.memory <= limit), None)
    if fitting is None:
        raise SettingsError(
            f"{name}: '{structure.ref}' needs at least {bytes_text(choices[-1].memory)}"
            f"{f', as {whole}' if whole else ''}; {advice}take fewer or shorter samples"
        )
    return fitting


def free_memory() -> int:
    """Bytes of memory that programs can still take."""
    return int(psutil.virtual_memory().available)


def _why_in_memory(job: Job, saves: bool) -> str | None:
    """What needs the whole model in memory; None if nothing does."""
    if isinstance(job, PruneJob) and job.steps > 1:
        return "--steps cuts copies of the model"
    if isinstance(job, PruneJob) and job.allocation.measures:
        return f"{job.allocation.label()} runs copies of the model"
    if not job.budget.from_shapes:
        return f"{job.budget.label()} measures the model"
    if saves and job.compensation.reads_text and not job.compensation.by_layer:
        return f"{job.compensation.label()} changes weights of the whole model"
    return None


class _Stage(NamedTuple):
    """Bytes: of memory, of hidden states between layers, and of other files."""

    memory: int = 0
    states: int = 0
    files: int = 0


class _Sizes:
    """The bytes that each stage of ``job`` takes for a model in ``dtype``."""

    def __init__(self, job: Job, structure: Structure, dtype: torch.dtype, device: str, saves: bool):
        graph, text = structure.graph, job.calibration
        self.job, self.graph, self.saves, self.item = job, graph, saves, dtype.itemsize
        self.config: Any = structure.config.get_text_config()
        self.hidden, self.vocabulary = int(self.config.hidden_size), int(self.config.vocab_size)
        sizes = {name: prod(shape) * self.item for name, shape in graph.shapes.items() if name not in graph.ties}
        self.weights, self.layer = sum(sizes.values()), self._largest_layer(sizes)
        self.outside = sum(size for name, size in sizes.items() if graph.layer_of(name) is None)
        self.samples, self.length = (text.samples, text.length_for(structure.config)) if text else (0, 1)
        self.tokens = self.samples * self.length
        self.kept = _kept_shares(job, structure)
        # Bytes of a number in a matrix product.
        self.product = 2 if dtype == torch.float32 and multiplies_bfloat16_fast(device) else self.item
        # Bytes of a layer for each token, as those of a gated MLP: forwards, and with gradients.
        inside = (shape for name, shape in graph.shapes.items() if graph.layer_of(name) is not None)
        self.widest = max(size for shape in inside for size in shape[-2:])
        self.forwards = 3 * self.widest * self.product + 2 * self.hidden * F32
        self.backwards = (4 * self.widest + 10 * self.hidden) * self.item
        self.stages = [_Stage(self.layer if saves else 0), self._text(), self._fits()]
        if isinstance(job, PruneJob):
            self.stages += [self._scores(job), self._trials(job)]

    def forecast(self, streamed: bool, process: int) -> Forecast:
        """With all weights in memory, or ``streamed``, two layers of them. ``process``: bytes of all else."""
        weights = self.outside + 2 * self.layer if streamed else self.weights
        if isinstance(self.job, PruneJob) and self.job.steps > 1:
            weights += self.weights  # of a copy that is cut
        peak = max(stage.memory + min(stage.states, DEFAULT_LIMIT) for stage in self.stages)
        files = max(max(0, stage.states - DEFAULT_LIMIT) + stage.files for stage in self.stages)
        if self.saves:
            groups = [(self.graph.by_name[name], share) for name, share in self.kept.items()]
            removed = sum((1 - share) * self.graph.parameters_per_unit(g) * g.units for g, share in groups)
            files += round(self.weights - min(removed * self.item, self.weights))
        return Forecast(streamed, process + weights + peak, files)

    def _text(self) -> _Stage:
        """Calibration text that is read, or that the model writes."""
        text, passage = self.job.calibration, min(64, self.length)
        if text is None or not text.writes:
            return _Stage(self.tokens * 64)
        rows = min(passages_at_once(self.config, passage, self.item), -(-self.tokens // passage))
        cache = passage * cached_bytes(self.config, self.item)
        return _Stage(rows * (cache + 4 * self.vocabulary * F32 + self.forwards) + self.tokens * 64)

    def _scores(self, job: PruneJob) -> _Stage:
        """Scores of units: from weights alone, from a forward walk, or from gradients."""
        graph, signals = self.graph, job.criterion.signals
        groups = [graph.by_name[name] for name in self.kept]
        spans = scored_spans(graph, [group for group in groups if group.kind != VOCABULARY], job.criterion)
        shapes = {name: graph.shapes[name] for name in spans}
        matrix = F32 * max((prod(shape[-2:]) for shape in shapes.values()), default=0)
        scoring = 3 * matrix if Signal.WEIGHT in signals else 0
        if VOCABULARY in job.kinds:
            scoring = max(scoring, 3 * self.length * self.vocabulary * F32)
        if signals <= {Signal.WEIGHT, Signal.TOKENS}:
            return _Stage(scoring)
        if not signals & GRADIENTS:
            matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
            squares = {name: prod(s[:-2]) * s[-1] ** 2 * F32 for name, s in matrices.items()}
            grams = self._largest_layer(squares) if Signal.GRAM in signals else 0
            observed = signals - {Signal.STREAM, Signal.STREAM_BLOCKS}
            width = max((s[-1] for s in matrices.values()), default=0) if observed else 0
            blocks = 1
            if Signal.STREAM_BLOCKS in signals:
                blocks = max(1, round(sum((1 - self.kept[group.name]) * group.units for group in groups)))
            memory = max(self._walk(width) + grams, 3 * grams + scoring)
            return _Stage(memory, self.tokens * self.hidden * F32 * blocks)
        tokens = min(self.tokens, GRADIENT_TOKENS) if job.compensation.reads_text else self.tokens
        at_once = self._at_once(1 if Signal.GRAD_SQ in signals else TOKENS_WITH_GRADIENTS)
        logits = min(at_once * self.vocabulary, max(LOGIT_ELEMENTS, self.vocabulary)) * (self.item + 3 * F32)
        layer = at_once * self.backwards
        if Signal.PRODUCT_GRAD in signals:
            layer += matrix + 5 * at_once * self.widest * F32
        else:
            sums = F32 * (1 + len(signals & {Signal.GRAD, Signal.GRAD_SQ}))
            each = sums if Signal.GRAD_SQ in signals or tokens > at_once else self.item
            gradients = each * self._largest_layer({name: prod(shape) for name, shape in shapes.items()})
            # Gradients take the place of what was kept.
            layer = max(layer, at_once * self.forwards + gradients)
        return _Stage(max(logits, layer + scoring), tokens * self.hidden * self.item * (graph.num_layers + 2))

    def _trials(self, job: PruneJob) -> _Stage:
        """Trial cuts of an allocation: the weights that one cuts, and logits of the uncut model and of the cut one."""
        if not job.allocation.measures:
            return _Stage()
        weights = Counter[str]()
        for group in (self.graph.by_name[name] for name in self.kept):
            if group.kind != VOCABULARY:
                together = group.kind if job.shape == "uniform" else group.name
                weights[together] += self.graph.parameters_per_unit(group) * group.units * self.item
        logits = self.vocabulary * (TRIED * 5 // 4 * self.item + 3 * self.length * F32)
        return _Stage(max(weights.values(), default=0) + logits)

    def _fits(self) -> _Stage:
        """A compensation: the sums and the solution of each fit."""
        if not (self.saves and self.job.compensation.reads_text and self.tokens):
            return _Stage()
        count = full = sums = solving = weights = 0
        for name, share in self.kept.items():
            for span in self.graph.by_name[name].spans_with(Role.CONSUMES):
                shape = self.graph.shapes[span.parameter]
                if len(shape) < 2 or span.axis < len(shape) - 2:
                    continue
                inputs, out = shape[span.axis], prod(shape[-2:]) // shape[span.axis]
                kept = max(1, round(inputs * share))
                count, full, weights = count + 1, max(full, inputs), weights + prod(shape) * self.item
                sums = max(sums, 2 * prod(shape[:-2]) * kept * (kept + out) * F32)
                solving = max(solving, 8 * kept**2 + 20 * kept * out)
        states = self.tokens * (self.hidden * F32 * (3 if count > self.graph.num_layers else 2) + full * self.product)
        memory = sums + max(self._walk(full), solving)
        return _Stage(memory, states, weights + 4 * self.tokens * self.hidden * F32)

    def _walk(self, width: int) -> int:
        """A micro-batch of a forward walk, with what is summed of matrices with ``width`` inputs."""
        each = max(self.forwards, 6 * self.hidden * F32 + width * (self.product + 10))
        return self._at_once(TOKENS_AT_ONCE) * each

    def _at_once(self, tokens: int) -> int:
        """Tokens of a micro-batch, of whole samples."""
        return self.length * max(1, min(self.samples, tokens // self.length))

    def _largest_layer(self, sizes: Mapping[str, int]) -> int:
        """The largest sum of any decoder layer."""
        sums = [0] * self.graph.num_layers
        for name, size in sizes.items():
            if (layer := self.graph.layer_of(name)) is not None:
                sums[layer] += size
        return max(sums)


def _kept_shares(job: Job, structure: Structure) -> dict[str, float]:
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
