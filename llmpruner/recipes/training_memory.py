"""What the training of a whole model takes, before its weights are read: said, and refused where the machine has
less."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import torch

from ..loading.model import Model, dtype_of, loaded_bytes
from ..recovery.memory import training_bytes
from .forecast import LATER, Forecast, Residency, Stage, check_machine
from .layer_sample import memory_before

if TYPE_CHECKING:
    from ..loading.model import Structure
    from ..plugins.catalog import Catalog
    from ..settings import LoadSettings
    from .jobs import RecoverJob

_BFLOAT16 = 2
_KEPT_STATES = 2
"""Checkpoints of the training on the disk, each with the trained weights and two moments of AdamW for them."""
_ADVICE = (
    "--strategy local reads one layer at a time, adapters (--strategy lora) have no gradients of all weights, and "
    "--micro-batch-size, --cutoff and --dtype bfloat16 save some"
)


def training_forecast(
    job: RecoverJob, opened: Structure, dense: Structure | None, load: LoadSettings, catalog: Catalog
) -> Forecast:
    """Memory and disk of a training that holds whole models, without its time, which its first steps show. ``dense``:
    of strategies that use the dense model.

    Raises `SettingsError` where a CPU's machine does not have the memory, however much of it is free.
    """
    model = opened.model if isinstance(opened, Model) else None
    item = (model.dtype if model is not None else dtype_of(opened, catalog, load)).itemsize
    device = model.device if model is not None else torch.device(load.device)
    graph, config = opened.graph, opened.config.get_text_config()
    # Sizes that a configuration calls otherwise are left out of the estimate.
    vocabulary, channels = (int(getattr(config, name, 0) or 0) for name in ("vocab_size", "hidden_size"))
    trained = job.strategy.trained_parameters(graph)
    models = [opened] if dense is None else [opened, dense]
    states = trained * item
    memory = {
        "weights": sum(loaded_bytes(one, catalog, load) for one in models),
        "gradients and moments of AdamW": 3 * states,
        **training_bytes(job.settings, vocabulary, channels, graph.num_layers, item),
        "modules and tokenizer": LATER,
    }
    if job.settings.autocast:
        memory["weights in bfloat16"] = sum(one.graph.total_parameters for one in models) * _BFLOAT16
    free, kept = psutil.virtual_memory().available, "values for the backward pass"
    if job.settings.gradient_checkpointing == "on" or (
        job.settings.gradient_checkpointing == "auto" and sum(memory.values()) > free
    ):
        memory[kept] //= graph.num_layers
    saves_adapters = job.strategy.adapters and not job.settings.merge
    disk = (0 if saves_adapters else graph.total_parameters * item) + _KEPT_STATES * 3 * states
    found = Forecast(Residency(), memory_before(model), (Stage("training", memory),), disk)
    if device.type == "cpu":
        check_machine(f"training '{opened.ref}' with {job.strategy.label()}", found, _ADVICE)
    return found
