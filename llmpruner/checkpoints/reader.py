"""CheckpointReader: loads checkpoints of one more format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


class CheckpointReader(Component):
    """Reads one checkpoint format into a transformers model. Keeps no state but its settings."""

    kind: ClassVar[str] = "checkpoint reader"
    family: ClassVar[str | None] = None
    """Name of the family of models in this format; None to find it by the configuration."""

    def recognises(self, path: Path) -> bool:
        """Whether ``path`` (which exists) is of this format. Must be fast: look at names, not at weights."""
        raise NotImplementedError

    def read_config(self, path: Path) -> PreTrainedConfig:
        """The configuration. Reads no weights."""
        raise NotImplementedError

    def read_model(self, path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
        """The model with its weights, in ``dtype`` (None: as stored). Must never unpickle code."""
        raise NotImplementedError

    def read_tokenizer(self, path: Path) -> Any | None:
        """The tokenizer, or None when the checkpoint has none."""
        raise NotImplementedError
