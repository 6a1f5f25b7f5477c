"""Writing a model in the form that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoints.adapters import save_adapter
from ..loading.model import Model
from . import pipeline


def save(
    model: Model, directory: Path, *, notes: Mapping[str, Any] | None = None, extra_files: Sequence[Path] = ()
) -> str:
    """Write a checkpoint directory, or one of adapters that were not merged; returns ``stock``, ``shim`` or
    ``adapter``. ``notes``, ``extra_files``: see `pipeline.save`; notes of adapters are in ``llmpruner-files.json``."""
    if hasattr(model.model, "peft_config"):
        origin = {**(notes or {}), "llmpruner": __version__, "recovery": (model.record or {}).get("recovery", [])}
        save_adapter(
            model.model, directory, base=model.ref, tokenizer=model.tokenizer, extra_files=extra_files, origin=origin
        )
        return "adapter"
    return pipeline.save(model, directory, notes=notes, extra_files=extra_files)
