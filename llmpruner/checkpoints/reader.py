"""CheckpointReader: how a plugin makes one more checkpoint format loadable."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


class CheckpointReader(Component):
    """Reads one checkpoint format into an ordinary transformers model. Keeps no state but its settings."""

    kind: ClassVar[str] = "checkpoint reader"
    family: ClassVar[str | None] = None
    """The family that models of this format belong to; None to let the configuration decide."""

    def recognises(self, path: Path) -> bool:
        """Whether ``path`` (which exists) is of this format. Must be cheap: look at names, not at weights."""
        raise NotImplementedError

    def read_config(self, path: Path) -> PreTrainedConfig:
        """The configuration alone."""
        raise NotImplementedError

    def read_model(self, path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
        """The model with its weights, in ``dtype`` (None: as stored). Must never unpickle code."""
        raise NotImplementedError

    def read_tokenizer(self, path: Path) -> Any | None:
        """The tokenizer, or None when the checkpoint brings none."""
        raise NotImplementedError
