"""The dense model that a pruned one was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LlmprunerError, ModelError
from ..settings import LoadSettings, settings_from
from ..structure.plan import structure_of
from .model import Model, Structure, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..plugins.catalog import Catalog

_PATH = "base_path"


def base_record(loaded: Structure) -> dict[str, str]:
    """The entry of ``llmpruner.json`` with the absolute path of a local model, by which `load_dense` finds it from any
    folder; plans contain only the reference that the user gave. Empty for a model that is not local, and for one that
    was pruned before, whose record has the path."""
    return {_PATH: loaded.path} if loaded.record is None and loaded.path is not None else {}


def load_dense(pruned: Model, catalog: Catalog, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load the dense model, in the dtype and on the device of ``pruned``.

    Raises `ModelError` when ``pruned`` was not pruned, or when the dense model cannot be opened or was replaced.
    """
    if not pruned.plans:
        raise ModelError(f"'{pruned.ref}' was not pruned by llmpruner, so no dense model is known for it")
    base = pruned.plans[0].base
    record: Any = pruned.record or {}
    path = record.get(_PATH)
    ref = path if isinstance(path, str) and Path(path).exists() else base.model
    dtype = str(pruned.model.dtype).removeprefix("torch.")
    options = settings_from(
        LoadSettings,
        {
            "family": pruned.family.name,
            "revision": None if Path(ref).exists() else base.revision,
            "dtype": dtype,
            "device": str(pruned.model.device),
            "trust_remote_code": trust_remote_code,
        },
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
