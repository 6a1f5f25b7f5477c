"""Training low-rank adapters with peft."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import peft
from torch import nn
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError, first_line
from .base import RecoveryJob, TrainingResult
from .losses import Loss
from .training import fit

if TYPE_CHECKING:
    from ..structure.coupling import CouplingGraph
    from .strategies import AdapterSettings


def train_adapters(job: RecoveryJob, settings: AdapterSettings, loss: Loss | None = None) -> TrainingResult:
    """Train LoRA adapters of the modules in `adapter_targets`, drawn by the job's seed, and merge them."""
    targets = adapter_targets(job.model, job.graph)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        bias="none",
        target_modules=targets,
        fan_in_fan_out=any(isinstance(job.model.get_submodule(path), Conv1D) for path in targets),
    )
    set_seed(job.settings.seed)
    with warnings.catch_warnings():
        # Of a name that transformers has deprecated, and of ``fan_in_fan_out``, which it corrects for each module.
        warnings.simplefilter("ignore")
        try:
            model: Any = peft.get_peft_model(job.model, config)
        except ValueError as error:
            raise UnsupportedModelError(
                f"peft has no adapters for a {job.model.config.model_type} model: {first_line(error)}"
            ) from error
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    losses = fit(model, job, loss)
    return TrainingResult(model.merge_and_unload(), losses, trained)


def adapter_targets(model: nn.Module, graph: CouplingGraph) -> list[str]:
    """Paths of the linear modules in the decoder layers whose weight belongs to a coupled group."""
    targets: dict[str, None] = {}
    owned = dict.fromkeys(span.parameter for group in graph.groups for span in group.spans)
    for parameter in filter(graph.is_decoder, owned):
        path, _, leaf = parameter.rpartition(".")
        if leaf == "weight" and isinstance(model.get_submodule(path), nn.Linear | Conv1D):
            targets[path] = None
    if not targets:
        raise UnsupportedModelError("no linear layer of the decoder owns coupled units, so there is nothing to adapt")
    return list(targets)
