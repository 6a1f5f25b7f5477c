"""CheckpointReader: loads checkpoints of one more format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from .source import TensorSource


class CheckpointReader(Component):
    """Reads one checkpoint format into a transformers model. Keeps no state but its settings."""

    kind: ClassVar[str] = "checkpoint reader"
    family: ClassVar[str | None] = None
    """Name of the family of models in this format; None to find it by the configuration."""

    def recognises(self, path: Path) -> bool:
        """Whether ``path`` (which exists) is of this format. Must be fast: look at names, not at weights."""
        raise NotImplementedError

    def read_config(self, path: Path) -> PreTrainedConfig:
        """The configuration. Reads no weights. Raises `CheckpointError` for a file that is damaged or missing."""
        raise NotImplementedError

    def read_model(self, path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
        """The model with its weights, in ``dtype`` (None: as stored), on the CPU. Must never unpickle code. Raises
        `CheckpointError` for a tensor that is missing, misshapen or damaged."""
        raise NotImplementedError

    def open_model(self, path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, TensorSource]:
        """As `read_model`, but the model is without weights (see `meta_model`), which are read layer by layer from the
        source beside it. Names and shapes of the stored tensors are checked, and no values are read.

        It may be left out: models of this format are then loaded as a whole, and ``--max-memory`` refuses those that do
        not fit. Raises `CheckpointError` as `read_model` does."""
        raise NotImplementedError

    def streams(self, path: Path) -> bool:
        """Whether `open_model` reads the model at ``path``; by default, where that is given. Must be fast."""
        del path
        return type(self).open_model is not CheckpointReader.open_model

    def read_tokenizer(self, path: Path) -> Any | None:
        """The tokenizer, or None when the checkpoint has none."""
        raise NotImplementedError
