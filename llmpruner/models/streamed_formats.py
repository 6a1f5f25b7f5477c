"""Which formats are read layer by layer, and what opens a model in each of them."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from .gguf_tensors import dequantisation_rate, lazy_gguf
from .lazy import LazyModel, lazy_checkpoint
from .shards import has_shards
from .torch_files import can_be_mapped, lazy_torch, torch_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from .reader import CheckpointReader
    from .reference import Reference


def why_format_is_not_streamed(ref: Reference, reader: CheckpointReader | None) -> str | None:
    """Why the format of a model cannot be read layer by layer; None if it can. ``reader``: of its format, where it is
    none of transformers'."""
    if reader is not None:
        return None if reader.streams(ref.directory) else f"the reader '{reader.name}' takes it as a whole"
    if not ref.directory.is_dir():
        return "it is not on this machine; download it first"
    if ref.gguf_file or has_shards(ref.directory):
        return None
    files = torch_files(ref.directory)
    if not files:
        return "it has neither safetensors nor .bin files"
    if not can_be_mapped(files):
        return "its .bin files were written before PyTorch 1.6, or are damaged; convert them to safetensors"
    return None


def open_by_layer(
    ref: Reference,
    reader: CheckpointReader | None,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    layers: str,
    beside: Path | None,
    *,
    once: bool,
    trust_remote_code: bool,
) -> LazyModel:
    """The model without weights, and what reads them, for what `why_format_is_not_streamed` accepts. ``config``: of the
    model. ``layers``: path of its decoder layers. ``beside``: see `lazy_checkpoint`.
    ``once``: see `open_streamed`."""
    if reader is not None:
        return LazyModel(*reader.open_model(ref.directory, dtype), layers)
    if ref.gguf_file:
        return lazy_gguf(ref.directory / ref.gguf_file, config, dtype, layers, beside if once else None)
    if has_shards(ref.directory):
        return lazy_checkpoint(ref.directory, dtype, layers, beside, trust_remote_code=trust_remote_code)
    return lazy_torch(ref.directory, dtype, layers, trust_remote_code=trust_remote_code)


def format_conversion_rate(ref: Reference, reader: CheckpointReader | None) -> float | None:
    """See `conversion_rate`; infinite where values are copied."""
    if ref.gguf_file:
        return dequantisation_rate(ref.directory / ref.gguf_file)
    return inf if reader is not None or not has_shards(ref.directory) else None
