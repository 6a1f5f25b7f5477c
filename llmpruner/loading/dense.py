"""The dense model that a pruned one was made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LlmprunerError, ModelError
from ..structure.plan import structure_of
from .model import LoadedConfig, LoadedModel, load_model
from .options import DTYPES, LoadOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..plugins.catalog import Catalog

_PATH = "base_path"


def base_record(loaded: LoadedConfig) -> dict[str, str]:
    """What ``llmpruner.json`` keeps beside the plans so that `load_dense` finds a local model from any folder: its
    absolute path. Plans hold nothing of the machine, so there the reference stands as it was given. Empty for a model
    that is not local, and for one that was pruned before, whose record has the path."""
    path = Path(loaded.ref)
    return {_PATH: str(path.absolute())} if loaded.record is None and path.exists() else {}


def load_dense(pruned: LoadedModel, catalog: Catalog, options: LoadOptions | None = None) -> PreTrainedModel:
    """Load the dense model, in the dtype and on the device of ``pruned``. ``options``: ``trust_remote_code`` counts.

    Raises `ModelError` when ``pruned`` was not pruned, or when the dense model cannot be opened or is another by now.
    """
    if not pruned.plans:
        raise ModelError(f"'{pruned.ref}' was not pruned by llmpruner, so no dense model is known for it")
    base = pruned.plans[0].base
    record: Any = pruned.record or {}
    path = record.get(_PATH)
    ref = path if isinstance(path, str) and Path(path).exists() else base.model
    dtype = str(pruned.model.dtype).removeprefix("torch.")
    options = replace(
        options or LoadOptions(),
        family=pruned.family.name,
        revision=base.revision,
        dtype=dtype if dtype in DTYPES else "auto",
        device=str(pruned.model.device),
    )
    looked_for = f"the dense model that '{pruned.ref}' was pruned from, '{base.model}'"
    try:
        dense = load_model(ref, catalog, options)
    except LlmprunerError as error:
        tried = f" (nothing is at {path} now)" if path and path != ref else ""
        raise ModelError(f"{looked_for}, cannot be opened{tried}: {error}") from error
    if dense.plans or structure_of(dense.graph) != base.structure:
        raise ModelError(f"{looked_for}, is another model now: parameters of '{ref}' differ in name or shape")
    return dense.model
