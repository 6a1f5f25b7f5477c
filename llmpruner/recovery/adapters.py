"""Training low-rank adapters with peft."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

from ..amounts import counted
from ..errors import MissingExtraError, UnsupportedModelError
from .base import RecoveryJob, TrainingResult
from .training import fit

if TYPE_CHECKING:
    from ..structure.coupling import CouplingGraph


def train_adapters(
    job: RecoveryJob, *, rank: int, alpha: int, dropout: float, rslora: bool = False, dora: bool = False
) -> TrainingResult:
    """Train LoRA adapters of the modules in `adapter_targets`; returns the peft model. Raises `MissingExtraError`
    without peft, and as `adapter_targets` and `fit` do."""
    model, notes = with_adapters(job, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, dora=dora)
    losses = fit(model, job)
    return TrainingResult(model, losses, sum(p.numel() for p in model.parameters() if p.requires_grad), notes)


def with_adapters(
    job: RecoveryJob, *, rank: int, alpha: int, dropout: float, rslora: bool = False, dora: bool = False
) -> tuple[Any, tuple[str, ...]]:
    """``job.model`` as a peft model with new LoRA adapters, drawn by the job's seed; and notes for the user. The
    settings are those of `LoraStrategy`."""
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft", "recover") from None

    targets, skipped = adapter_targets(job.model, job.graph)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        use_rslora=rslora,
        use_dora=dora,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(job.model.get_submodule(path), Conv1D) for path in targets),
    )
    set_seed(job.settings.seed)
    with warnings.catch_warnings():
        # Where a model mixes Linear and Conv1D, peft corrects ``fan_in_fan_out`` per module and warns.
        warnings.filterwarnings("ignore", message="fan_in_fan_out", category=UserWarning)
        # peft reads a name that transformers has deprecated.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        model: Any = peft.get_peft_model(job.model, config)
    get = "gets" if len(skipped) == 1 else "get"
    what = f"{counted(len(skipped), 'parameter')} of experts {get} no adapters"
    notes = (f"{what} ({skipped[0]}, …)",) if skipped else ()
    return model, notes


def adapter_targets(model: nn.Module, graph: CouplingGraph) -> tuple[list[str], list[str]]:
    """Paths of the linear modules in the decoder layers whose weight belongs to a coupled group; and the names of
    stacked weights of experts, of shape (experts, out, in), which belong to one but get no adapters.

    Raises `UnsupportedModelError` when there is no such module.
    """
    targets: dict[str, None] = {}
    skipped: dict[str, None] = {}
    owned = dict.fromkeys(span.parameter for group in graph.groups for span in group.spans)
    for parameter in filter(graph.is_decoder, owned):
        path, _, leaf = parameter.rpartition(".")
        module = model.get_submodule(path)
        if len(graph.shapes[parameter]) == 3:
            skipped[parameter] = None
        elif leaf == "weight" and isinstance(module, nn.Linear | Conv1D):
            targets[path] = None
    if not targets:
        raise UnsupportedModelError("no linear layer of the decoder owns coupled units, so there is nothing to adapt")
    return list(targets), list(skipped)
