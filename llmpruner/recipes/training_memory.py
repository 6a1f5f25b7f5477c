"""The memory and disk that the training of a whole model takes, computed before weights are read, and refused where
the machine has less."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..engine.boundaries import DEFAULT_LIMIT
from ..models.model import Model
from ..models.numbers import dtype_of, loaded_bytes
from ..models.opening import why_not_streamed
from ..recovery.memory import KEPT_VALUES, free_bytes, training_bytes
from .forecast import LATER, Forecast, Residency, Stage, check_machine, machine_memory
from .layer_sample import layer_parameters, memory_before

if TYPE_CHECKING:
    from ..models.model import Structure
    from ..plugins.catalog import Catalog
    from ..settings import LoadSettings
    from .jobs import RecoverJob

_BFLOAT16, _FLOAT32 = 2, 4
"""Bytes of a value."""
_KEPT_STATES = 3
"""Checkpoints of the training on the disk, each with the trained weights and two moments of AdamW for them: two are
kept (``save_total_limit``), and the older one is removed after a third is written."""
_KEPT_BEST = 2
"""Files of the trained weights with the lowest validation loss: now, and when the newest checkpoint was saved."""
_ADVICE = (
    "--strategy local reads one layer at a time, adapters (--strategy lora) have no gradients of all weights, and "
    "--micro-batch-size, --cutoff and --dtype bfloat16 save some"
)


def reads_dense_by_layer(
    job: RecoverJob, opened: Structure, dense: Structure | None, load: LoadSettings, catalog: Catalog
) -> bool:
    """Whether the dense model is read layer by layer: where the strategy and its files allow it, and both models
    take more than half of the device's free memory."""
    if dense is None or not job.strategy.streams_dense:
        return False
    size = sum(loaded_bytes(structure, load) for structure in (opened, dense))
    large = size > free_bytes(_device(opened, load)) // 2
    return large and why_not_streamed(dense, catalog, load, cuts=False) is None


def training_forecast(
    job: RecoverJob,
    opened: Structure,
    dense: Structure | None,
    load: LoadSettings,
    catalog: Catalog,
    *,
    by_layer: bool = False,
) -> Forecast:
    """Memory and disk of a training that holds the whole pruned model, without its time, which its first steps show.
    ``dense``: of strategies that use the dense model; ``by_layer``: whether it is read layer by layer."""
    model = opened.model if isinstance(opened, Model) else None
    dtype = model.dtype if model is not None else dtype_of(opened, load)
    item = dtype.itemsize
    graph, config = opened.graph, opened.config.get_text_config()
    # Sizes that a configuration calls otherwise are left out of the estimate.
    vocabulary, channels = (int(getattr(config, name, 0) or 0) for name in ("vocab_size", "hidden_size"))
    trained = job.strategy.trained_parameters(graph)
    widened = trained > 0 and item < _FLOAT32 and job.strategy.in_float32
    states = trained * (_FLOAT32 if widened else item)
    settings = job.settings.model_copy(
        update={"autocast": job.settings.autocast or (widened and dtype == torch.bfloat16)}
    )
    own = loaded_bytes(opened, load)
    stages, models = [], [opened]
    if dense is not None and job.strategy.streams_dense:
        stages.append(Stage("predictions of the dense model", {"weights": own, **_of_dense(dense, item, by_layer)}))
    elif dense is not None:
        models.append(dense)
    memory = {
        "weights": sum(loaded_bytes(one, load) for one in models),
        "gradients and moments of AdamW": 3 * states,
        **training_bytes(settings, vocabulary, channels, graph.num_layers, _FLOAT32 if widened else item),
        "modules and tokenizer": LATER,
    }
    if widened:
        # Without autocast, the model is in float32 as a whole.
        memory["weights in float32"] = (trained if settings.autocast else graph.total_parameters) * (_FLOAT32 - item)
    if settings.autocast and (widened or item == _FLOAT32):
        cast = trained if widened else sum(one.graph.total_parameters for one in models)
        memory["weights in bfloat16"] = cast * _BFLOAT16
    checkpointing = job.settings.gradient_checkpointing
    fits = sum(memory.values()) <= free_bytes(_device(opened, load))
    if checkpointing == "on" or (checkpointing == "auto" and not fits):
        memory[KEPT_VALUES] //= graph.num_layers
    disk = _disk(job, graph.total_parameters * item, states)
    return Forecast(Residency(), memory_before(model), (*stages, Stage("training", memory)), disk)


def _disk(job: RecoverJob, result: int, trained: int) -> int:
    """Bytes of the result (all weights: ``result``), and of what is kept during the training. ``trained``: bytes of the
    trained weights."""
    saves_adapters = job.strategy.adapters and not job.settings.merge
    validates = job.settings.validation_data is not None or job.settings.validation > 0
    kept = _KEPT_STATES * 3 * trained + (_KEPT_BEST * trained if validates else 0)
    return kept if saves_adapters else result + kept


def _of_dense(dense: Structure, item: int, by_layer: bool) -> dict[str, int]:
    """Bytes that computing the dense model's predictions takes."""
    if not by_layer:
        return {"weights of the dense model": dense.graph.total_parameters * item}
    layers = layer_parameters(dense.graph)
    outside = dense.graph.total_parameters - sum(layers)
    return {"layer of the dense model": max(*layers, outside) * item, "hidden states": DEFAULT_LIMIT}


def check_training(job: RecoverJob, opened: Structure, found: Forecast, load: LoadSettings) -> None:
    """Raise `SettingsError` where a CPU's machine does not have the memory, however much of it is free."""
    if _device(opened, load).type == "cpu":
        strategy, advice = job.strategy, _ADVICE
        if getattr(strategy.settings, "float32", False):
            advice += f"; weights of 16 bits take half with --set {strategy.name}.float32=false, and learn less"
        check_machine(f"training '{opened.ref}' with {strategy.label()}", found, advice)


def memory_of_device(opened: Structure, load: LoadSettings) -> int:
    """Bytes of memory of the device that a model is trained on, free or not."""
    device = _device(opened, load)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_memory()


def _device(opened: Structure, load: LoadSettings) -> torch.device:
    return opened.model.device if isinstance(opened, Model) else torch.device(load.device)
