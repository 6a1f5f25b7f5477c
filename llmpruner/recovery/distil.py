"""Distillation from the dense model. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..component import ComponentSettings
from ..errors import SettingsError
from .base import RecoveryJob, RecoveryStrategy, TrainingResult
from .distil_settings import DistilSettings

if TYPE_CHECKING:
    from ..structure.coupling import CouplingGraph


class DistilStrategy(RecoveryStrategy):
    """Knowledge distillation (Hinton, Vinyals, Dean, 2015): the pruned model is trained to predict what the dense model
    predicts, for every token of the data: the target is a distribution over the whole vocabulary.

    The loss is the mean over trained tokens of T² · KL(p ‖ q), with the predictions p of the dense and q of the pruned
    model at temperature T, plus what the settings add to it. The dense model is in memory beside the pruned one; with
    ``top``, only until its most likely tokens are written to the folder of the training, and where both do not fit, it
    is read layer by layer for that.
    """

    name = "distil"
    needs_dense = True
    summary = "trains toward the predictions of the dense model (Hinton et al., 2015)"

    Settings = DistilSettings
    settings: DistilSettings

    def __init__(self, settings: ComponentSettings | None = None, /, **values: Any) -> None:
        """Raises `SettingsError`, besides as every component does, for settings without effect on what is trained, and
        for hidden states where the dense model is not kept."""
        super().__init__(settings, **values)
        own, fields = self.settings, type(self.settings).model_fields
        for name in ("rank", "alpha", "dropout", "rslora", "dora"):
            if own.trains != "lora" and getattr(own, name) != fields[name].default:
                raise SettingsError(f"{self.label()}: {name} has no effect with trains={own.trains}; give trains=lora")
        if own.trains == "lora" and not own.float32:
            raise SettingsError(
                f"{self.label()}: float32 has no effect with trains=lora, whose adapters are in float32; leave it out"
            )
        if own.hidden and own.top:
            raise SettingsError(f"{self.label()}: hidden needs the dense model in every step; give either it or top")

    @property
    def adapters(self) -> bool:  # type: ignore[override]
        return self.settings.trains == "lora"

    @property
    def in_float32(self) -> bool:  # type: ignore[override]
        return self.settings.float32

    @property
    def streams_dense(self) -> bool:  # type: ignore[override]
        return bool(self.settings.top)

    def trained_parameters(self, graph: CouplingGraph) -> int:
        return {"all": graph.total_parameters, "touched": graph.decoder_parameters, "lora": 0}[self.settings.trains]

    def train(self, job: RecoveryJob) -> TrainingResult:
        from .distillation import train_distilled

        return train_distilled(job, self.settings)
