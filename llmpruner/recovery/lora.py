"""Training low-rank adapters with peft."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

from ..errors import MissingExtraError, UnsupportedModelError
from ..values import counted
from .base import RecoveryJob, TrainingResult
from .losses import Loss
from .training import fit

if TYPE_CHECKING:
    from ..structure.coupling import CouplingGraph
    from .strategies import AdapterSettings


def train_adapters(job: RecoveryJob, settings: AdapterSettings, loss: Loss | None = None) -> TrainingResult:
    """Train LoRA adapters of the modules in `adapter_targets`; the peft model, or the merged one.

    Raises `MissingExtraError` without peft, and as `adapter_targets` and `fit` do.
    """
    model, notes = with_adapters(job, settings)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    losses = fit(model, job, loss)
    return TrainingResult(model.merge_and_unload() if settings.merge else model, losses, trained, notes)


def with_adapters(job: RecoveryJob, settings: AdapterSettings) -> tuple[Any, tuple[str, ...]]:
    """``job.model`` as a peft model with new LoRA adapters, drawn by the job's seed; and notes for the user. Raises as
    `train_adapters`, before ``job.model`` is changed."""
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft", "recover") from None

    targets, skipped = adapter_targets(job.model, job.graph)
    refused = _refused(job.model, targets)
    targets = [path for path in targets if path not in refused]
    if not targets:
        raise UnsupportedModelError(f"peft adapts no linear layer of a {job.model.config.model_type} model")
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
        # Where a model mixes Linear and Conv1D, peft corrects ``fan_in_fan_out`` per module and warns.
        warnings.filterwarnings("ignore", message="fan_in_fan_out", category=UserWarning)
        # peft reads a name that transformers has deprecated.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        model: Any = peft.get_peft_model(job.model, config)
    notes = (*_note("parameter", " of experts", skipped), *_note("module", ", which peft refuses,", refused))
    return model, notes


def _note(noun: str, which: str, names: Sequence[str]) -> tuple[str, ...]:
    get = "gets" if len(names) == 1 else "get"
    return (f"{counted(len(names), noun)}{which} {get} no adapters ({names[0]}, …)",) if names else ()


def _refused(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Those of ``targets`` that peft refuses in models of this type, such as modules of which Mamba's kernels read the
    weight past the module. peft would say so halfway through changing ``model``, so it is asked with a stand-in."""
    import peft

    refused = set()
    for leaf in {path.rpartition(".")[2] for path in targets}:
        stand_in = nn.Module()
        stand_in.config = model.config
        stand_in.add_module(leaf, nn.Linear(1, 1))
        try:
            peft.inject_adapter_in_model(peft.LoraConfig(r=1, target_modules=[leaf]), stand_in)
        except ValueError:
            refused.add(leaf)
    return [path for path in targets if path.rpartition(".")[2] in refused]


def adapter_targets(model: nn.Module, graph: CouplingGraph) -> tuple[list[str], list[str]]:
    """Paths of the linear modules in the decoder layers whose weight belongs to a coupled group; and the names of
    stacked weights of experts, of shape (experts, out, in), which belong to a group but get no adapters.

    Raises `UnsupportedModelError` when there is no such module.
    """
    targets: dict[str, None] = {}
    skipped: dict[str, None] = {}
    owned = dict.fromkeys(span.parameter for group in graph.groups for span in group.spans)
    for parameter in filter(graph.is_decoder, owned):
        path, _, leaf = parameter.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, nn.Conv1d):
            continue  # its weight has three axes, too
        if len(graph.shapes[parameter]) == 3:
            skipped[parameter] = None
        elif leaf == "weight" and isinstance(module, nn.Linear | Conv1D):
            targets[path] = None
    if not targets:
        raise UnsupportedModelError("no linear layer of the decoder owns coupled units, so there is nothing to adapt")
    return list(targets), list(skipped)
