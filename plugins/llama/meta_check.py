"""Whether files in Meta's format hold the model that they were written from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmpruner import CheckpointError

from .meta_format import MetaTensors
from .meta_reader import MetaReader, config_of
from .meta_tokenizer import TOKENIZER
from .meta_writer import stored_name
from .tensors import TensorSource

if TYPE_CHECKING:
    from transformers import LlamaConfig

_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("rms_norm_eps", "rope_parameters"),
)


def check_written(directory: Path, source: TensorSource, config: LlamaConfig) -> None:
    """Read ``directory`` back and compare it with ``source``: the sizes and rotary settings of the configuration, and
    every tensor bit by bit, one at a time. Raises `CheckpointError` for the first difference."""
    written = MetaTensors(directory)
    # The reader would otherwise look for a tokenizer in the folder above, too.
    tokenizer = MetaReader().read_tokenizer(directory) if (directory / TOKENIZER).is_file() else None
    again = config_of(written, tokenizer)
    for field in _FIELDS:
        ours, theirs = getattr(again, field), getattr(config, field)
        if ours != theirs:
            raise CheckpointError(f"Meta's format does not keep {field}: it was {theirs}, and is read back as {ours}")
    for name in written.specs:
        if not torch.equal(written.read(name), source.read(stored_name(source, name))):
            raise CheckpointError(f"{name} is read back with other values than were written: check disk and memory")
