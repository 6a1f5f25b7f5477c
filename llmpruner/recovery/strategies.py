"""The built-in strategies: full, lora and distil. Imports no torch."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..component import ComponentSettings
from ..errors import UnsupportedModelError, first_line
from ..structure.coupling import CouplingGraph
from .base import RecoveryJob, RecoveryStrategy, TrainingResult

if TYPE_CHECKING:
    from .losses import Loss


class FullStrategy(RecoveryStrategy):
    name = "full"
    summary = "trains every parameter; needs about 16 bytes of memory for each"

    def trained_parameters(self, graph: CouplingGraph) -> int:
        return graph.total_parameters

    def train(self, job: RecoveryJob) -> TrainingResult:
        from .training import fit

        job.model.requires_grad_(True)
        return fit(job.model, job)


class LoraStrategy(RecoveryStrategy):
    """LoRA (Hu et al., 2021) as in LLM-Pruner, section 3.3, with its defaults. Stacked experts get no adapters."""

    name = "lora"
    needs_peft = True
    summary = "trains low-rank adapters of the decoder's linear layers, and merges them (Hu et al., 2021)"

    class Settings(ComponentSettings):
        rank: int = Field(8, ge=1, le=16_384, description="Rank of the adapters.")
        alpha: int = Field(16, ge=1, description="Scale of the adapters: their product is multiplied by alpha / rank.")
        dropout: float = Field(0.05, ge=0, lt=1, description="Dropout of the adapters' inputs, while training.")

    settings: Settings

    def train(self, job: RecoveryJob) -> TrainingResult:
        return _adapters_trained(job, self.settings)


class DistilStrategy(RecoveryStrategy):
    """Knowledge distillation (Hinton, Vinyals, Dean, 2015). The loss is the mean over trained tokens of KL(p ‖ q), with
    the predictions p of the dense and q of the pruned model over the vocabulary. Where a row is read more than once, or
    memory is too small for both models, p is read once, before the training, and kept on the disk: the likeliest tokens
    and a sample of the others, which give the same loss in expectation."""

    name = "distil"
    needs_dense = takes_predictions = True
    summary = "trains toward the predictions of the dense model (Hinton et al., 2015)"

    class Settings(LoraStrategy.Settings):
        # Those of LoRA are for ``trains=lora``.
        trains: Literal["all", "lora"] = Field("all", description="What is trained: all weights, or LoRA adapters.")
        labels: float = Field(
            0.0, ge=0, lt=1, description="Weight of the cross entropy of the next token; the divergence has the rest."
        )
        dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the adapters' inputs, while training.")

    settings: Settings

    @property
    def needs_peft(self) -> bool:
        return self.settings.trains == "lora"

    def trained_parameters(self, graph: CouplingGraph) -> int:
        return 0 if self.needs_peft else graph.total_parameters

    def train(self, job: RecoveryJob) -> TrainingResult:
        from .losses import distillation_loss
        from .training import fit

        loss = distillation_loss(job, self.settings.labels)
        if self.needs_peft:
            return _adapters_trained(job, self.settings, loss)
        job.model.requires_grad_(True)
        return fit(job.model, job, loss)


def _adapters_trained(job: RecoveryJob, settings: LoraStrategy.Settings, loss: Loss | None = None) -> TrainingResult:
    """Train LoRA adapters of the modules in `adapter_targets`, drawn by the job's seed, and merge them."""
    import peft
    from transformers import set_seed

    from .training import fit

    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=adapter_targets(job.model, job.graph),
    )
    set_seed(job.settings.seed)
    with warnings.catch_warnings():
        # Of a name that transformers has deprecated, and of ``fan_in_fan_out``, which peft sets for Conv1D itself.
        warnings.simplefilter("ignore")
        try:
            model: Any = peft.get_peft_model(job.model, config)
        except ValueError as error:
            kind = job.model.config.model_type
            raise UnsupportedModelError(f"peft has no adapters for a {kind} model: {first_line(error)}") from error
    result = fit(model, job, loss)
    return replace(result, model=model.merge_and_unload())


def adapter_targets(model: Any, graph: CouplingGraph) -> list[str]:
    """Paths of the linear modules in the decoder layers whose weight belongs to a coupled group."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    names = dict.fromkeys(span.parameter for group in graph.groups for span in group.spans)
    paths = [name.removesuffix(".weight") for name in names if graph.is_decoder(name) and name.endswith(".weight")]
    targets = [path for path in paths if isinstance(model.get_submodule(path), nn.Linear | Conv1D)]
    if not targets:
        raise UnsupportedModelError("no linear layer of the decoder owns coupled units, so there is nothing to adapt")
    return targets
