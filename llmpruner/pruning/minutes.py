"""How long a prune takes: what it computes, by shapes, times the rates of this machine, which are measured in at most
two seconds on products of the model's shapes. Meant to be within half of the truth."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import ceil
from typing import NamedTuple

import torch
from torch.nn import functional

from ..calibration.written import ANSWER_TOKENS, passages_at_once
from ..engine.signals import GRADIENTS, Signal
from ..models.devices import CPU, multiplies_bfloat16_fast, of_sums, synchronize
from ..models.generation import number_of
from ..models.model import Structure
from .job import Job, PruneJob
from .selection import GRADIENT_TOKENS

_PRODUCT = 3e10  # operations of a product that is measured
_OTHERS = 1.3  # norms, activations and sums, as a factor on the products of a layer
_WRITTEN = 1.4  # attention to cached keys and values, and prompts, as a factor on text that is written
_GRADIENTS = 3.5  # forward passes
_START = 10  # seconds until the libraries and the model are loaded, and for the report
_STEP = 5e-4  # seconds of a layer for one token, however fast it computes
_TOKENS = 80  # of a passage or an answer
_KEPT = 0.8  # of the inputs of a matrix
_READ = 1e9  # bytes of weights a second, from files


class Rates(NamedTuple):
    """Seconds. ``layers``, ``head``: of one token among many; ``step``: of one token alone, through all; ``operation``:
    of a multiplication in the sums of a fit; ``solved``: of one in a linear system; ``pass_over``: to read weights."""

    layers: float
    head: float
    step: float
    operation: float
    solved: float
    pass_over: float


def seconds_of(job: Job, structure: Structure, rates: Rates, *, streamed: bool, cuts: bool, ratios: int = 1) -> float:
    """Of a whole run. ``ratios``: how many are fitted beside one run of the dense model."""
    text = job.calibration
    passes = rates.pass_over if streamed else 0.0
    seconds = _START + rates.pass_over * (1 + ratios * cuts)  # to load, and to save
    if text is None:
        return seconds
    length = text.length_for(structure.config)
    tokens = text.samples_for(structure) * length
    compared = text.compared(structure) * length if cuts else 0
    if text.writes:
        seconds += _written(tokens, structure, rates, passes)
    forward = rates.layers + rates.head
    seconds += (1 + ratios) * (compared * forward + passes)
    if isinstance(job, PruneJob) and job.criterion.needs - {Signal.WEIGHT}:
        if job.criterion.needs & GRADIENTS:
            read = min(tokens, GRADIENT_TOKENS) if job.compensation.reads_text else tokens
            seconds += _GRADIENTS * read * forward + 2 * passes
        else:
            seconds += tokens * rates.layers + passes
    if cuts and job.compensation.reads_text:
        seconds += tokens * rates.layers + passes
        seconds += ratios * (tokens * rates.layers + _fits(tokens, structure, rates))
    return seconds


def _written(tokens: int, structure: Structure, rates: Rates, passes: float) -> float:
    """To write so many tokens, one after another in many passages at once."""
    rows = min(ceil(tokens / _TOKENS), passages_at_once(structure.config.get_text_config(), ANSWER_TOKENS, 4))
    return ceil(tokens / rows) * (max(rates.step, _WRITTEN * rows * (rates.layers + rates.head)) + passes)


def _fits(tokens: int, structure: Structure, rates: Rates) -> float:
    """Sums over the inputs that stay of the widest matrix of each layer, and five systems that are solved."""
    graph = structure.graph
    sizes = [shape[-2:] for name, shape in graph.shapes.items() if graph.is_decoder(name) and len(shape) > 1]
    widest = max(sizes, key=max)
    width, out = _KEPT * max(widest), min(widest)
    sums, solved = tokens * width * (width * 5 / 8 + out), 5 * width**3 / 6
    return graph.num_layers * (sums * rates.operation + solved * rates.solved)


def measured(job: Job, structure: Structure, item: int, device: torch.device) -> Rates:
    """The rates of ``device``. ``item``: bytes of a weight."""
    graph, config = structure.graph, structure.config.get_text_config()
    fast = item == 2 or multiplies_bfloat16_fast(device.type)
    like = partial(torch.ones, dtype=torch.bfloat16 if fast else torch.float32, device=device)

    def product(out: int, width: int, rows: int) -> float:
        return _timed(partial(functional.linear, like(rows, width), like(out, width)), device)

    every, products = Counter[tuple[int, int]](), 0.0
    for name, shape in graph.shapes.items():
        if graph.is_decoder(name) and len(shape) > 1:
            every[shape[-2], shape[-1]] += 1 if len(shape) == 2 else getattr(config, "num_experts_per_tok", 1)
    for (out, width), count in every.items():
        rows = int(min(1024, out, width, max(64, _PRODUCT / (2 * out * width))))
        products += count * product(out, width, rows) / rows
    hidden, heads = int(config.hidden_size), number_of(config, "num_attention_heads", 1) or 1
    length = job.calibration.length_for(structure.config) if job.calibration else 1
    query = like(1, heads, length, max(1, hidden // heads))
    attend = partial(functional.scaled_dot_product_attention, query, query, query, is_causal=True)
    attention = graph.num_layers * _timed(attend, device) / length
    (out, width), wide = max(every), min(max(max(every)), 2048)
    alone = product(out, width, 1) / (out * width)  # of a weight that is read
    symmetric = torch.eye(wide, dtype=torch.float64, device=of_sums(device))
    return Rates(
        layers=_OTHERS * products + attention,
        head=product(int(config.vocab_size), hidden, 64) / 64,
        step=alone * graph.total_parameters + _STEP * graph.num_layers,
        operation=product(wide, wide, wide) / wide**3,
        solved=_timed(partial(torch.linalg.cholesky, symmetric), of_sums(device)) / (wide**3 / 6),
        pass_over=item * graph.total_parameters / _READ,
    )


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the second of two runs."""
    for _ in range(2):
        began = time.perf_counter()
        run()
        if device != CPU:
            synchronize(device)
    return time.perf_counter() - began
