"""What a training takes, by shapes alone: rather a third too much than a tenth too little. It decides whether layers
compute their activations again for the gradients, and whether processes share the weights in shards.

    memory = process + weights with gradients and moments + dense model + activations and logits of a micro-batch
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch

from ..discovery.opening import Opener
from ..engine.ranks import Ranks
from ..errors import SettingsError
from ..models.devices import described, free_memory, processes_on, total_memory
from ..models.generation import table_of
from ..models.model import Structure
from ..models.numbers import dtype_of, loaded_bytes
from ..pruning.forecast import F32, MODULES
from ..settings import LoadSettings
from ..structure.coupling import layer_number
from ..values import bytes_text
from .data import RecoverySetup
from .training import filled_in

_BLOCKS = 8 * F32 << 22  # of logits in a loss, see `mean_over_tokens`
_SAVED = 1.5  # numbers kept for the gradients, for each that a matrix reads or gives: norms, products, rotations


@dataclass(frozen=True)
class Forecast:
    """Bytes of one process. ``held``: weights, gradients and moments of AdamW; ``dense``: the dense model beside them,
    if the strategy has it there; ``part``: of the largest part of the model, gathered from shards, with its gradient;
    ``activations``: of all layers, for a micro-batch; ``boundaries``: of one layer, and what enters the others;
    ``logits``: with their gradients. ``dense_fits``: whether a dense model whose predictions may be made before fits
    too."""

    held: int
    dense: int
    part: int
    activations: int
    boundaries: int
    logits: int
    recomputes: bool = False
    shards: int = 1
    dense_fits: bool = False

    @property
    def memory(self) -> int:
        gathered = self.part if self.shards > 1 else 0
        kept = self.boundaries if self.recomputes else self.activations
        return MODULES + self.held // self.shards + self.dense + gathered + kept + self.logits

    def __str__(self) -> str:
        sharded = f"; weights in {self.shards} shards, one for each process" if self.shards > 1 else ""
        recomputes = "; activations computed again for the gradients, as they would not fit" if self.recomputes else ""
        return f"about {bytes_text(self.memory)} of memory{sharded}{recomputes}"


def forecast(
    setup: RecoverySetup, opened: Structure, dense: Structure | None, opener: Opener, kept: bool | None = None
) -> Forecast:
    """The training with the fewest savings that fits into free memory, else with all. ``dense``: the dense model, if
    anything reads it. ``kept``: whether the training that is continued is sharded. The first process decides.
    Raises `SettingsError` for more memory than the machine has."""
    ranks = Ranks.current()
    device = opener.device_for(opened)
    chosen = ranks.from_first(lambda: _chosen(setup, opened, dense, opener, device, kept, ranks.count))
    opener.progress.status(f"on {described(device)}; strategy {setup.strategy.name}: {chosen}")
    return chosen


def _chosen(
    setup: RecoverySetup, opened: Structure, dense: Structure | None, opener: Opener, device: torch.device,
    kept: bool | None, processes: int,
) -> Forecast:  # fmt: skip
    sharded = setup.settings.sharded if setup.settings.sharded is not None else kept
    if sharded and processes == 1:
        raise SettingsError("--set recover.sharded=true needs several processes; start them by torchrun")
    shards = [1] if processes == 1 or sharded is False else [processes] if sharded else [1, processes]
    whole, free = estimate(setup, opened, dense, opener.load), free_memory(device) // processes_on(device)
    choices = [replace(whole, shards=count, recomputes=again) for count in shards for again in (False, True)]
    chosen = next((each for each in choices if each.memory <= free), choices[-1])
    needed, memory = chosen.held // chosen.shards + chosen.dense, total_memory(device) // processes_on(device)
    if needed > memory:
        room = f"{needed / 2**30:.1f} GiB of memory for '{opened.ref}', of {memory / 2**30:.1f}"
        raise SettingsError(f"{setup.strategy.name} needs {room}; --strategy lora and --dtype bfloat16 take less")
    beside = 0 if dense is None else loaded_bytes(dense, opener.load)
    return replace(chosen, dense_fits=chosen.shards == 1 and chosen.memory + beside <= free)


def estimate(setup: RecoverySetup, opened: Structure, dense: Structure | None, load: LoadSettings) -> Forecast:
    """Of a process with whole weights and all activations."""
    graph, settings, config = opened.graph, setup.settings, opened.config.get_text_config()
    item, trained = dtype_of(opened, load).itemsize, setup.strategy.trained_parameters(graph)
    # A number that is trained takes 16 bytes: itself, its gradient and two moments of AdamW, in float32.
    held = loaded_bytes(opened, load) + trained * (4 * F32 - item)
    beside = setup.strategy.needs_dense and not setup.strategy.takes_predictions
    of_dense = loaded_bytes(dense, load) if dense is not None and beside else 0
    # The number of rows is not known yet: as for many, whose batches are the largest.
    rows = min(settings.micro_batch_size, filled_in(settings, 10**9, processes=1).batch_size or 1)
    tokens = rows * min(settings.cutoff, table_of(opened.config) or settings.cutoff)
    widths, parts = [0] * graph.num_layers, [0] * (graph.num_layers + 1)
    for name, shape in graph.shapes.items():
        number = layer_number(name, graph.layers)
        parts[graph.num_layers if number is None else number] += prod(shape)
        if number is not None and len(shape) > 1:  # of experts, a token sees few
            widths[number] += sum(shape[-2:]) * (getattr(config, "num_experts_per_tok", 1) if len(shape) > 2 else 1)
    of_layers = [int(_SAVED * tokens * width * F32) for width in widths]
    boundaries = tokens * int(config.hidden_size) * F32 * graph.num_layers
    logits = tokens * int(config.vocab_size)
    of_loss = (3 if dense is not None else 2) * logits * item + min(8 * F32 * logits, _BLOCKS)
    return Forecast(held, of_dense, 2 * F32 * max(parts), sum(of_layers), boundaries + max(of_layers), of_loss)
