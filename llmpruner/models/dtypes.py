"""The dtype of a model in its files and in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from ..settings import DEMO, LoadSettings
from .adapters import adapter_base
from .record import read_json
from .reference import Reference, resolve

if TYPE_CHECKING:
    from ..plugins.catalog import Catalog
    from .model import Structure


def dtype_of(structure: Structure, catalog: Catalog, options: LoadSettings) -> torch.dtype:
    """The dtype that weights will have in memory."""
    return dtype_in_memory(options, structure, resolve(structure.ref, catalog, revision=options.revision))


def stored_dtype(structure: Structure) -> torch.dtype | None:
    """The dtype that the files of a model state; None where they state none, and for GGUF files, which have types of
    their own."""
    if structure.ref == DEMO or (structure.path is not None and structure.path.endswith(".gguf")):
        return None
    return _stated_dtype(structure)


def widened(structure: Structure, catalog: Catalog, options: LoadSettings) -> str | None:
    """A line for a model whose weights take more room once they are saved than they are stored in; None for others."""
    stored, memory = stored_dtype(structure), dtype_of(structure, catalog, options)
    if options.dtype != "auto" or stored != torch.float16 or memory != torch.float32:
        return None
    return (
        f"'{structure.ref}' is stored in float16, and is loaded and saved as float32, in which a CPU computes; --dtype "
        "float16 keeps it"
    )


def loaded_bytes(structure: Structure, catalog: Catalog, options: LoadSettings) -> int:
    """Bytes that the weights of a model take in memory."""
    return structure.graph.total_parameters * dtype_of(structure, catalog, options).itemsize


def dtype_in_memory(options: LoadSettings, structure: Structure, ref: Reference) -> torch.dtype:
    if options.dtype != "auto":
        return cast("torch.dtype", getattr(torch, options.dtype))
    stored = _stated_dtype(structure) or torch.float32
    if ref.gguf_file or (stored == torch.float16 and options.device == "cpu"):
        return torch.float32
    return stored


def _stated_dtype(structure: Structure) -> torch.dtype | None:
    """The dtype in the configuration of a model; None where there is none."""
    stated = getattr(structure.config, "dtype", None)
    if structure.record is not None and structure.path is not None:
        # The configuration of the structure is that of the dense model, which may be stored in another dtype.
        folder = Path(structure.path)
        while (base := adapter_base(folder)) is not None:
            folder = Path(base)
        file = folder / "config.json"
        stated = read_json(file).get("dtype", stated) if file.is_file() else stated
    return getattr(torch, stated, None) if isinstance(stated, str) else stated
