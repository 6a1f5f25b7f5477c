"""Writing a checkpoint in Meta's format, and comparing it with its source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmpruner import CheckpointError, ExportTask

from .meta_convert import config_of, tokenizer_in
from .meta_files import TOKENIZER
from .meta_format import MetaTensors
from .meta_writer import meta_params, open_source, remarks, stored_name, write_files
from .tensors import TensorSource

if TYPE_CHECKING:
    from transformers import LlamaConfig

_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("rms_norm_eps", "rope_parameters"),
)


def write_and_check(task: ExportTask, shards: int, tokenizer: Path | None) -> list[str]:
    """Write ``task.source`` to ``task.directory`` in Meta's format, check it, and return `remarks`. ``tokenizer``: file
    to copy."""
    tensors, config = open_source(task.source)
    params = meta_params(tensors, config, shards)
    task.progress.status("Writing Meta's format")
    write_files(tensors, params, task.directory, shards, tokenizer)
    task.progress.status("Reading it back")
    check_written(task.directory, tensors, config)
    return remarks(params, config)


def check_written(directory: Path, source: TensorSource, config: LlamaConfig) -> None:
    """Read ``directory`` back and compare it with ``source``: the sizes and rotary settings of the configuration, and
    every tensor bit by bit, one at a time. Raises `CheckpointError` for the first difference."""
    written = MetaTensors(directory)
    # Only in ``directory``: `tokenizer_in` also searches its parent.
    tokenizer = tokenizer_in(directory) if (directory / TOKENIZER).is_file() else None
    again = config_of(written, tokenizer)
    for field in _FIELDS:
        ours, theirs = getattr(again, field), getattr(config, field)
        if ours != theirs:
            raise CheckpointError(f"Meta's format does not keep {field}: it was {theirs}, and is read back as {ours}")
    for name in written.specs:
        if not torch.equal(written.read(name), source.read(stored_name(source, name))):
            raise CheckpointError(f"{name} is read back with other values than were written: check disk and memory")
