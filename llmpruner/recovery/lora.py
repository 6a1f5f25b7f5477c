"""LoRA: low-rank adapters on the linear layers of coupled groups (Hu et al., 2021; LLM-Pruner, section 3.3)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..component import ComponentSettings
from ..errors import MissingExtraError, UnsupportedModelError
from .base import RecoveryJob, RecoveryStrategy, TrainingResult

if TYPE_CHECKING:
    from torch import nn

    from ..structure.coupling import CouplingGraph


class LoraStrategy(RecoveryStrategy):
    name = "lora"
    adapters = True
    summary = "trains low-rank adapters beside the decoder's linear layers, and merges them (Hu et al., 2021)"

    class Settings(ComponentSettings):
        """The defaults are LLM-Pruner's."""

        rank: int = Field(8, ge=1, description="Rank of the adapters.")
        alpha: int = Field(16, ge=1, description="Scale of the adapters: their product is multiplied by alpha / rank.")
        dropout: float = Field(0.05, ge=0, lt=1, description="Dropout of the adapters' inputs, while training.")

    settings: Settings

    def train(self, job: RecoveryJob) -> TrainingResult:
        try:
            import peft
        except ImportError:
            raise MissingExtraError("peft", "recover") from None
        from transformers import set_seed

        from .training import fit

        targets, skipped = adapter_targets(job.model, job.graph)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=self.settings.rank,
            lora_alpha=self.settings.alpha,
            lora_dropout=self.settings.dropout,
            bias="none",
            target_modules=targets,
            fan_in_fan_out=any(_is_conv1d(job.model.get_submodule(path)) for path in targets),
        )
        set_seed(job.settings.seed)
        with warnings.catch_warnings():
            # Where a model mixes Linear and Conv1D, peft corrects ``fan_in_fan_out`` per module and warns.
            warnings.filterwarnings("ignore", message="fan_in_fan_out", category=UserWarning)
            # peft reads a name that transformers has deprecated.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            model: Any = peft.get_peft_model(job.model, config)
        losses = fit(model, job)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        notes = (f"{len(skipped)} parameters of experts get no adapters ({skipped[0]}, …)",) if skipped else ()
        return TrainingResult(model, losses, trainable, notes)


def adapter_targets(model: nn.Module, graph: CouplingGraph) -> tuple[list[str], list[str]]:
    """Paths of the linear modules in the decoder layers whose weight belongs to a coupled group; and the names of
    stacked weights of experts, of shape (experts, out, in), which belong to one but get no adapters.

    Raises `UnsupportedModelError` when there is no such module.
    """
    from torch import nn

    targets: dict[str, None] = {}
    skipped: dict[str, None] = {}
    owned = dict.fromkeys(span.parameter for group in graph.groups for span in group.spans)
    for parameter in filter(graph.is_decoder, owned):
        path, _, leaf = parameter.rpartition(".")
        module = model.get_submodule(path)
        if len(graph.shapes[parameter]) == 3:
            skipped[parameter] = None
        elif leaf == "weight" and (isinstance(module, nn.Linear) or _is_conv1d(module)):
            targets[path] = None
    if not targets:
        raise UnsupportedModelError("no linear layer of the decoder owns coupled units, so there is nothing to adapt")
    return list(targets), list(skipped)


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
