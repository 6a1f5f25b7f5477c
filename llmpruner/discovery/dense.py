"""The dense model that a pruned one was made from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LlmprunerError, ModelError
from ..files import exists
from ..models.model import Model, Structure
from ..models.opening import load_model, open_streamed
from ..models.record import sampled_sha256
from ..settings import LoadSettings, settings_from
from ..structure.plan import structure_of
from .structure import load_structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..plugins.catalog import Catalog


_LOG = logging.getLogger("llmpruner")
_PATH, _WEIGHTS = "base_path", "base_weights"
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf")


def base_record(loaded: Structure) -> dict[str, str]:
    """The entries of ``llmpruner.json`` of a local model: its absolute path, by which `load_dense` finds it from any
    folder, as plans contain only the reference that the user gave; and what tells its weights from others. Empty for a
    model that is not local, and for one that was pruned before, whose record has them."""
    if (loaded.record or {}).get("plans") or loaded.path is None:
        return {}
    weights = _sampled_weights(Path(loaded.path))
    return {_PATH: loaded.path} | ({} if weights is None else {_WEIGHTS: weights})


def _sampled_weights(place: Path) -> str | None:
    """SHA-256 over the names of a model's files with weights and what `sampled_sha256` gives of each; None where there
    are none, or one cannot be read."""
    try:
        files = [place] if place.is_file() else sorted(f for f in place.iterdir() if f.suffix in _SUFFIXES)
        sums = {file.name: sampled_sha256(file) for file in files if file.is_file()}
    except OSError:
        return None
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest() if sums else None


def dense_structure(pruned: Structure, catalog: Catalog, *, trust_remote_code: bool = False) -> Structure:
    """The structure of the dense model, found by the record of ``pruned``. Reads no weights, but samples of the files,
    for a warning where they are not those of the record: another model of the same shapes.

    Raises `ModelError` when ``pruned`` was not pruned, or when the dense model cannot be opened or was replaced.
    """
    with _named(pruned):
        ref = _reference(pruned)
        dense = load_structure(ref, catalog, _options(pruned, ref, trust_remote_code))
    _check(pruned, dense, ref)
    recorded = (pruned.record or {}).get(_WEIGHTS)
    if recorded is not None and dense.path is not None and recorded != _sampled_weights(Path(dense.path)):
        _LOG.warning(
            "the files with weights in '%s' are not those from which '%s' was pruned: another model, or the same one "
            "stored in other files", ref, pruned.ref,
        )  # fmt: skip
    return dense


def load_dense(pruned: Model, catalog: Catalog, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load the dense model, in the dtype and on the device of ``pruned``. Raises as `dense_structure`."""
    return open_dense(pruned, catalog, placed_as(pruned, trust_remote_code)).model


def placed_as(loaded: Model, trust_remote_code: bool) -> LoadSettings:
    """Settings that load another model in the dtype and on the device of ``loaded``."""
    device = loaded.model.device if loaded.streamed is None else loaded.streamed.device
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    values = {"dtype": dtype, "device": str(device), "trust_remote_code": trust_remote_code}
    return settings_from(LoadSettings, values)


def open_dense(
    pruned: Structure, catalog: Catalog, load: LoadSettings, *, streamed: bool = False, beside: Path | None = None
) -> Model:
    """The dense model with its tokenizer, in the dtype and on the device of ``load``. ``streamed``: read layer by
    layer; ``beside``: see `open_streamed`. Raises as `dense_structure`."""
    with _named(pruned):
        ref = _reference(pruned)
        options = _options(pruned, ref, load.trust_remote_code, dtype=load.dtype, device=load.device)
        structure = load_structure(ref, catalog, options)
        if streamed:
            dense = open_streamed(structure, catalog, options, beside, ahead=False)
        else:
            dense = load_model(structure, catalog, options)
    _check(pruned, dense, ref)
    return dense


def check_named_base(pruned: Structure, named: str, catalog: Catalog, *, trust_remote_code: bool = False) -> None:
    """Raise `ModelError` unless ``named`` can be opened and can be the dense model of ``pruned``, instead of the one in
    its record."""
    # The recorded revision is one of the recorded model.
    options = _options(pruned, named, trust_remote_code).model_copy(update={"revision": None})
    try:
        dense = load_structure(named, catalog, options)
    except Exception:  # the groups that the recorded family declares, for another architecture
        try:
            dense = load_structure(named, catalog, LoadSettings(trust_remote_code=trust_remote_code))
        except LlmprunerError as error:
            raise ModelError(f"--base '{named}' cannot be opened: {error}") from error
    if not _fits(pruned, dense):
        recorded = pruned.plans[0].base.model
        raise ModelError(
            f"--base '{named}' is not the model that '{pruned.ref}' was pruned from ('{recorded}'): parameters differ "
            "in name or shape"
        )


def _fits(pruned: Structure, dense: Structure) -> bool:
    """Whether the plans of ``pruned`` are of a model with the parameters of ``dense``."""
    return not dense.plans and structure_of(dense.graph) == pruned.plans[0].base.structure


def _reference(pruned: Structure) -> str:
    if not pruned.plans:
        raise ModelError(f"'{pruned.ref}' was not pruned by llmpruner, so no dense model is known for it")
    path = (pruned.record or {}).get(_PATH)
    return path if isinstance(path, str) and exists(path) else pruned.plans[0].base.model


def _options(pruned: Structure, ref: str, trust_remote_code: bool, **further: str) -> LoadSettings:
    values: dict[str, Any] = {
        "family": pruned.family.name,
        "revision": None if exists(ref) else pruned.plans[0].base.revision,
        "trust_remote_code": trust_remote_code,
    }
    return settings_from(LoadSettings, {**values, **further})


@contextmanager
def _named(pruned: Structure) -> Iterator[None]:
    """Errors of opening the dense model, with what it is."""
    try:
        yield
    except LlmprunerError as error:
        if not pruned.plans:
            raise
        path = (pruned.record or {}).get(_PATH)
        gone = isinstance(path, str) and not exists(path) and path != pruned.plans[0].base.model
        tried = f" (nothing is at {path} now)" if gone else ""
        raise ModelError(f"{_looked_for(pruned)}, cannot be opened{tried}: {error}") from error


def _check(pruned: Structure, dense: Structure, ref: str) -> None:
    if not _fits(pruned, dense):
        raise ModelError(
            f"{_looked_for(pruned)}, is another model now: parameters of '{ref}' differ in name or shape"
        )  # fmt: skip


def _looked_for(pruned: Structure) -> str:
    return f"the dense model that '{pruned.ref}' was pruned from, '{pruned.plans[0].base.model}'"
