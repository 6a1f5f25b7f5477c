"""What a prune takes, by shapes alone: rather a third too much than a tenth too little. It decides whether weights are
loaded in memory or read layer by layer.

    memory = process + weights, all or those of two layers + hidden states up to their limit + the largest stage
    disk   = result + hidden states beyond their limit + what is kept for a run that is continued

An accelerator has all of the memory but the process. Weights come to it one by one, or layer by layer; what is in
float64 stays on the host where the accelerator has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import psutil

from ..calibration.written import ANSWER_TOKENS, passages_at_once
from ..discovery.opening import Opener
from ..engine.boundaries import DEFAULT_LIMIT
from ..engine.execution import TOKENS_AT_ONCE, TOKENS_WITH_GRADIENTS
from ..engine.signals import GRADIENTS, Signal
from ..errors import ModelError, SettingsError
from ..models.devices import CPU, described, free_memory, multiplies_bfloat16_fast, of_sums, processes_on, total_memory
from ..models.generation import LOGIT_ELEMENTS, cached_bytes
from ..models.model import Model, Structure
from ..models.numbers import dtype_of
from ..models.opening import why_not_streamed
from ..structure.coupling import CoupledGroup, CouplingGraph, Role
from ..values import bytes_text, counted
from .job import Job, PruneJob, why_in_memory
from .selection import GRADIENT_TOKENS, TRIED, scope_of

F32 = 4
LONG = 30  # minutes after which a line says what is faster
MODULES = 96 << 20  # imported during the work, the tokenizer, and free lists of the allocator


@dataclass(frozen=True)
class Forecast:
    """``streamed``: weights are read layer by layer. ``memory``: largest resident bytes of the process; ``disk``: bytes
    written; ``device``: that computes, with its free memory; ``device_memory``: bytes of an accelerator, or None;
    ``seconds``: see `minutes`, None where a run only goes on."""

    streamed: bool
    memory: int
    disk: int
    device: str
    device_memory: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        disk = f" and {bytes_text(self.disk)} of disk" if self.disk else ""
        device = "" if self.device_memory is None else f", {bytes_text(self.device_memory)} of the device's"
        weights = "read layer by layer" if self.streamed else "in memory"
        needed = f"about {bytes_text(self.memory)} of memory{device}{disk} (weights: {weights})"
        return f"on {self.device}: needs {needed}{'' if self.seconds is None else _time_text(self.seconds)}"

    @property
    def computing(self) -> int:
        """Bytes of the device that computes."""
        return self.memory if self.device_memory is None else self.device_memory


def _time_text(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return ", and less than a minute"
    faster = "; faster: --method fast, fewer --samples, a text file as --calibration, or another --device"
    return f", and about {counted(minutes, 'minute')}{faster if minutes > LONG else ''}"


def forecast(
    job: Job, structure: Structure, opener: Opener, max_memory: int | None, *, saves: bool, in_memory: bool
) -> Forecast:
    """The forecast with all weights in memory, where they fit into half of the host's free memory, the whole run into
    what an accelerator has free, or into ``max_memory`` of the device that computes; else layer by layer. ``saves``:
    the model is cut. Raises `SettingsError` where neither fits, and `ModelError` for a streamed model whose weights are
    needed in memory."""
    item = dtype_of(structure, opener.load).itemsize
    possible, why = _possible(job, structure, saves, in_memory)
    process, device, held = psutil.Process().memory_info().rss + MODULES, opener.device_for(structure), 0
    if isinstance(structure, Model) and structure.streamed is None:
        held = sum(parameter.nbytes for parameter in structure.network.parameters())
    autocast = item == F32 and job.calibration is not None and multiplies_bfloat16_fast(device.type)
    needed, disk = needed_bytes(job, structure, item, saves=saves, autocast=autocast)
    here = described(device)
    if device == CPU:
        choices = [Forecast(streamed, process - held + needed[streamed], disk, here) for streamed in possible]
        limit, place = total_memory(CPU), "this machine"
        every = item * structure.graph.total_parameters * processes_on(CPU)
        if max_memory is None and every > free_memory(CPU) // 2:
            choices = choices[-1:]
    else:
        if of_sums(device) == CPU:
            process += needed[True]
        choices = [Forecast(streamed, process, disk, here, needed[streamed]) for streamed in possible]
        limit, place = free_memory(device) // processes_on(device) + held, str(device)
    name, advice = f"{place} has {bytes_text(limit)} of memory", "give --max-memory, or "
    if max_memory is not None:
        limit, name, advice = max_memory, f"--max-memory {bytes_text(max_memory)}", "raise it, or "
    fitting = next((choice for choice in choices if choice.computing <= limit), None)
    if fitting is None:
        raise SettingsError(
            f"{name}: '{structure.ref}' needs at least {bytes_text(choices[-1].computing)}"
            f"{f', as {why}' if why else ''}; {advice}take fewer or shorter samples"
        )
    return fitting


def _possible(job: Job, structure: Structure, saves: bool, in_memory: bool) -> tuple[list[bool], str | None]:
    """Whether weights may be streamed, the choices in order; and what needs them in memory."""
    why = why_in_memory(job, saves)
    if not isinstance(structure, Model):
        why = "the result stays in memory" if in_memory else why or why_not_streamed(structure)
        return ([False] if why else [False, True]), why
    if structure.streamed is None:
        return [False], "it is loaded already"
    if why or (saves and job.compensation.name != "none"):
        raise ModelError(f"'{structure.ref}' is read layer by layer; pass its folder")
    return [True], None


def needed_bytes(
    job: Job, structure: Structure, item: int, *, saves: bool = True, autocast: bool = False
) -> tuple[Mapping[bool, int], int]:
    """Bytes that the device takes which computes, by whether weights, of ``item`` bytes each, are streamed; and bytes
    of disk. ``autocast``: a model in memory keeps a copy in bfloat16 while it runs."""
    graph, text, config = structure.graph, job.calibration, structure.config.get_text_config()
    weights, layer = item * graph.total_parameters, item * graph.decoder_parameters // graph.num_layers
    hidden, vocabulary = int(config.hidden_size), int(config.vocab_size)
    length = text.length_for(structure.config) if text else 1
    tokens = text.samples_for(structure) * length if text else 0
    at_once = max(length, min(tokens, TOKENS_AT_ONCE))
    widest = max(size for name, shape in graph.shapes.items() if graph.is_decoder(name) for size in shape[-2:])
    batch = at_once * 4 * F32 * (hidden + widest)  # of a token in a layer, four numbers for each channel
    stages = [layer, 4 * F32 * min(at_once * vocabulary, LOGIT_ELEMENTS)]
    copies, states, disk = 0, tokens * hidden * F32, weights if saves else 0
    if text and text.writes:
        longest = 2 * ANSWER_TOKENS  # an instruction with its answer
        written = 2 if autocast else item
        rows = min(passages_at_once(config, longest, written), -(-tokens // ANSWER_TOKENS))
        stages.append(rows * (longest * cached_bytes(config, written) + 4 * F32 * vocabulary))
    if isinstance(job, PruneJob):
        groups = scope_of(job, structure).groups(graph)
        read = min(tokens, GRADIENT_TOKENS) if job.compensation.reads_text else tokens
        running = batch
        if job.criterion.needs & GRADIENTS:
            states = max(states, read * hidden * item * (graph.num_layers + 2))
            differentiated = max(length, min(tokens, TOKENS_WITH_GRADIENTS))
            running = max(batch, differentiated * 8 * F32 * (hidden + widest))  # what autograd keeps is twice as much
        stages.append(running + _scores(job, graph, groups, item, read))
        copies = weights if job.steps > 1 else 0
        if job.allocation.measures:  # a trial copies what stays of a kind, or of a group
            copies += (weights // 2 if job.shape == "uniform" else layer) + TRIED * vocabulary * F32
    else:
        groups = tuple(graph.by_name[name] for name in job.plan.cuts)
    if saves and job.compensation.reads_text:
        stages.append(batch + _sums(graph, groups))
        states = max(states, tokens * (3 * hidden + widest) * F32)
        disk += weights // 4 + 4 * tokens * hidden * F32  # layers and hidden states, for a run that is continued
    others = copies + max(stages) + min(states, DEFAULT_LIMIT)
    two_layers = weights - item * graph.decoder_parameters + 2 * layer
    whole = weights * 3 // 2 if autocast else weights
    return {False: whole + others, True: two_layers + others}, disk + max(0, states - DEFAULT_LIMIT)


def _scores(job: PruneJob, graph: CouplingGraph, groups: Iterable[CoupledGroup], item: int, tokens: int) -> int:
    """Three copies of a matrix in float32, and one layer's gradients or sums."""
    signals = job.criterion.needs
    names = {span.parameter for group in groups for span in group.spans} or set(filter(graph.is_decoder, graph.shapes))
    copies = 3 * F32 * max(prod(graph.shapes[name][-2:]) for name in names)
    if Signal.GRAM in signals:
        copies += _sums(graph, groups)
    numbers = sum(prod(graph.shapes[name]) // (graph.num_layers if graph.is_decoder(name) else 1) for name in names)
    summed = tokens > TOKENS_WITH_GRADIENTS or Signal.GRAD_SQ in signals
    return copies + numbers * (2 * F32 if summed else item) * len(signals & {Signal.GRAD, Signal.GRAD_SQ})


def _sums(graph: CouplingGraph, groups: Iterable[CoupledGroup]) -> int:
    """Products of a matrix's inputs with one another and with its outputs: fitted, held out, and once more to solve."""
    sizes = [0]
    for span in (span for group in groups for span in group.spans_with(Role.CONSUMES)):
        shape = graph.shapes[span.parameter]
        if graph.is_decoder(span.parameter) and len(shape) > 1 and span.axis >= len(shape) - 2:  # not experts
            sizes.append(F32 * (2 * prod(shape[:-2]) + 1) * shape[span.axis] * sum(shape[-2:]))
    return max(sizes)
