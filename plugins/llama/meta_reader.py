"""Meta's official format as a checkpoint reader."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpruner import CheckpointReader

from .meta_files import PARAMS, SHARDS

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedModel


class MetaReader(CheckpointReader):
    """``params.json`` and ``consolidated.NN.pth``, as Meta publishes LLaMA 1, 2 and 3."""

    name = "meta-llama"
    summary = "LLaMA 1, 2 and 3 as Meta publishes them: params.json and consolidated.NN.pth"
    family = "llama"

    def recognises(self, path: Path) -> bool:
        if not path.is_dir() or (path / "config.json").exists():
            return False
        weights = any(path.glob(SHARDS))
        # A folder without its shards is recognised too, so that the error names what is missing.
        return weights or ((path / PARAMS).is_file() and not any(path.glob("*.safetensors")))

    def read_config(self, path: Path) -> LlamaConfig:
        from .meta_convert import config_in

        return config_in(path)

    def read_model(self, path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
        from .meta_convert import model_in

        return model_in(path, dtype)

    def read_tokenizer(self, path: Path) -> Any | None:
        from .meta_convert import tokenizer_in

        return tokenizer_in(path)
