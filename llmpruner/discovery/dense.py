"""The dense model that a pruned one was made from."""

from __future__ import annotations

import hashlib
import json
import logging
from os.path import exists
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LlmprunerError, ModelError, not_pruned
from ..files import WEIGHTS
from ..models.model import Model, Structure
from ..models.opening import load_model
from ..models.record import sampled_sha256
from ..settings import LoadSettings, settings_from
from ..structure.plan import structure_of
from .structure import load_structure

if TYPE_CHECKING:
    from ..plugins.catalog import Catalog


_LOG = logging.getLogger("llmpruner")
_PATH, _WEIGHTS = "base_path", "base_weights"


def base_record(loaded: Structure) -> dict[str, str]:
    """The entries of ``llmpruner.json`` of a local model that was not pruned before: its absolute path and a hash of
    its weights. Empty for others."""
    if (loaded.record or {}).get("plans") or loaded.path is None:
        return {}
    weights = _sampled_weights(Path(loaded.path))
    return {_PATH: loaded.path} | ({} if weights is None else {_WEIGHTS: weights})


def _sampled_weights(place: Path) -> str | None:
    """SHA-256 over names and `sampled_sha256` of a model's files with weights; None without readable ones."""
    try:
        files = [place] if place.is_file() else sorted(f for f in place.iterdir() if f.suffix in WEIGHTS)
        sums = {file.name: sampled_sha256(file) for file in files if file.is_file()}
    except OSError:
        return None
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest() if sums else None


def dense_structure(
    pruned: Structure, catalog: Catalog, load: LoadSettings | None = None, *, named: str | None = None
) -> Structure:
    """The structure of the dense model that the record of ``pruned`` names, or ``named``. Reads no weights, but samples
    of the files, for a warning where they are not those of the record: another model of the same shapes.

    Raises `ModelError` when ``pruned`` was not pruned, or when the dense model cannot be opened or was replaced.
    """
    dense = _structure(pruned, catalog, load or LoadSettings(), named)
    recorded = None if named else (pruned.record or {}).get(_WEIGHTS)
    if recorded is not None and dense.path is not None and recorded != _sampled_weights(Path(dense.path)):
        _LOG.warning(
            "the files with weights in '%s' are not those from which '%s' was pruned: another model, or the same one "
            "stored in other files", dense.ref, pruned.ref,
        )  # fmt: skip
    return dense


def open_dense(pruned: Structure, catalog: Catalog, load: LoadSettings) -> Model:
    """The dense model with its tokenizer, in the dtype and on the device of ``load``. Raises as `dense_structure`."""
    return load_model(_structure(pruned, catalog, load, None), catalog, load)


def _structure(pruned: Structure, catalog: Catalog, load: LoadSettings, named: str | None) -> Structure:
    if not pruned.plans:
        raise not_pruned(pruned.ref)
    base, path = pruned.plans[0].base, (pruned.record or {}).get(_PATH)
    ref = named or (path if isinstance(path, str) and exists(path) else base.model)
    options = load.model_copy(update={"family": None, "revision": None})
    if named is None:
        revision = None if exists(ref) else base.revision
        options = options.model_copy(update={"family": pruned.family.name, "revision": revision})
    try:
        dense = load_structure(ref, catalog, options)
    except LlmprunerError as error:
        raise ModelError(
            f"the dense model that '{pruned.ref}' was pruned from, '{ref}', cannot be opened: {error}"
        ) from error
    if dense.plans or structure_of(dense.graph) != base.structure:
        raise ModelError(
            f"'{ref}' is not the model that '{pruned.ref}' was pruned from ('{base.model}'): parameters differ in name "
            "or shape"
        )
    return dense


def placed_as(loaded: Model, trust_remote_code: bool) -> LoadSettings:
    """Settings that load another model in the dtype and on the device of ``loaded``."""
    device = loaded.model.device if loaded.streamed is None else loaded.streamed.device
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    values = {"dtype": dtype, "device": str(device), "trust_remote_code": trust_remote_code}
    return settings_from(LoadSettings, values)
