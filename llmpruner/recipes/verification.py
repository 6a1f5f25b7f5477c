"""Whether a checkpoint is what was saved: its files, tensors, values and shapes, and its weights beside the base's.

Weights are read one tensor, then one layer at a time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..amounts import counted
from ..discovery.structure import load_structure
from ..errors import (
    CheckpointError,
    LlmprunerError,
    MissingExtraError,
    ModelError,
    PluginError,
    UnsupportedModelError,
)
from ..models.checkpoint import ADAPTER_WEIGHTS, adapter_base
from ..models.numbers import first_not_finite
from ..models.opening import open_weights, why_not_streamed
from ..models.record import RECORD_FILE, damaged_files, read_any_record, recorded_files
from ..models.remote import ALLOW
from ..models.shards import check_index, has_shards, names_in, opened
from ..models.weights import StreamedWeights
from ..progress import QUIET, Progress
from ..settings import LoadSettings
from .against_base import Base, NotComparable, at_hand

if TYPE_CHECKING:
    from ..models.model import Structure
    from ..plugins.catalog import Catalog

PASSED, DAMAGED, NOT_CHECKED = "passed", "damaged", "not checked"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Check:
    """``name``: ``files``, ``tensors``, ``values``, ``shapes``, ``weights`` or ``logits``. ``state``: ``passed``,
    ``damaged`` or ``not checked``. ``detail``: what was compared; for damage, the file and the tensor; else why not."""

    name: str
    state: str
    detail: str


@dataclass(frozen=True)
class Verification:
    """The result of `verify_checkpoint`."""

    directory: str
    checks: tuple[Check, ...]

    @property
    def damage(self) -> tuple[str, ...]:
        """A line for each thing that is damaged; empty for a checkpoint that is not."""
        return tuple(check.detail for check in self.checks if check.state == DAMAGED)

    def as_json(self) -> dict[str, Any]:
        checks = [{"check": c.name, "state": c.state, "detail": c.detail} for c in self.checks]
        return {"directory": self.directory, "damaged": bool(self.damage), "checks": checks}


def check_checkpoint(directory: Path) -> None:
    """Raise `ModelError` for what `verification` does not take."""
    if not directory.is_dir():
        raise ModelError(f"'{directory}' is no checkpoint directory; verify takes what prune, recover or export wrote")
    if adapter_base(directory) is not None:
        return
    if not (directory / RECORD_FILE).is_file() and not has_shards(directory):
        files = sorted(file.name for file in directory.glob("*.gguf"))
        if files:
            raise ModelError(
                f"'{directory}' holds {', '.join(files)}, and verify reads safetensors files alone; export compared "
                "the file with the model when it wrote it"
            )
        raise ModelError(
            f"'{directory}' has neither a {RECORD_FILE} nor safetensors files, so there is nothing to verify"
        )


def verification(
    directory: Path, base: str | None, load: LoadSettings, catalog: Catalog, progress: Progress = QUIET
) -> Verification:
    """Check ``directory``. ``base``: reference of the dense model, instead of that in the record.

    Damage is part of the result. Raises `ModelError` for a directory that holds no checkpoint, and for a ``base`` that
    cannot be opened or is another model.
    """
    check_checkpoint(directory)
    return _Checks(directory, load, catalog, progress).run(base)


class _Checks:
    """The checks of one checkpoint, in their order. ``places``: tensor → the file that it is in, once these are known.
    ``opened``: structure and weights, once their shapes were compared."""

    def __init__(self, directory: Path, load: LoadSettings, catalog: Catalog, progress: Progress) -> None:
        self.directory, self.load, self.catalog, self.progress = directory, load, catalog, progress
        self.done: list[Check] = []
        self.places: dict[str, str] = {}
        self.opened: tuple[Structure, StreamedWeights] | None = None

    def run(self, base: str | None) -> Verification:
        self.progress.status("comparing files with the record")
        self.done += _files(self.directory)
        if self.attempt("tensors", lambda: _tensors(self.directory, self.places)):
            self.progress.status("looking for values that are not finite")
            self.attempt("values", lambda: _values(self.directory, self.places))
        if any(check.state == DAMAGED for check in self.done):
            return self.without_the_rest("the files are damaged")
        adapted = adapter_base(self.directory)
        if adapted is not None:
            return self.without_the_rest(f"these are adapters; '{adapted}', which they change, is verified on its own")
        load = self.load.model_copy(update={"dtype": _stored_dtype(self.directory, self.places)})
        self.attempt("shapes", lambda: self.shapes(load))
        if self.opened is None:
            shapes = self.done[-1]
            return self.without_the_rest(shapes.detail if shapes.state == NOT_CHECKED else "the files are damaged")
        structure, weights = self.opened
        dense = _base(structure, base, load, self.catalog)
        if isinstance(dense, str):
            return self.without_the_rest(dense)
        self.progress.status(f"comparing with '{dense.ref}'")
        if not self.attempt("weights", lambda: self.kept_weights(dense, weights)):
            return self.without_the_rest("the weights differ already")
        self.attempt("logits", lambda: dense.logits(weights))
        return Verification(str(self.directory), tuple(self.done))

    def attempt(self, name: str, check: Callable[[], str]) -> bool:
        """Keep the result of ``check``, which returns what was compared; returns whether no damage was found."""
        try:
            self.done.append(Check(name, PASSED, check()))
        except NotComparable as reason:
            self.done.append(Check(name, NOT_CHECKED, str(reason)))
        except LlmprunerError as error:
            self.done.append(Check(name, DAMAGED, str(error)))
        return self.done[-1].state != DAMAGED

    def without_the_rest(self, reason: str) -> Verification:
        """The result where ``reason`` keeps the remaining checks from being made."""
        done = {check.name for check in self.done}
        rest = [name for name in ("values", "shapes", "weights", "logits") if name not in done]
        return Verification(str(self.directory), (*self.done, *(Check(name, NOT_CHECKED, reason) for name in rest)))

    def shapes(self, load: LoadSettings) -> str:
        form = (read_any_record(self.directory) or {}).get("format")
        if form is not None:
            raise NotComparable(f"the format {form} is for other programs, and llmpruner does not open it")
        with _Placed(self.directory, self.places):
            structure = _structure(self.directory, load, self.catalog)
            self.progress.status("comparing shapes with the plans")
            self.opened = structure, _opened(self.directory, structure, load, self.catalog)
        return f"those of {counted(len(structure.plans), 'plan')}, no tensor missing or unknown"

    def kept_weights(self, dense: Base, weights: StreamedWeights) -> str:
        with _Placed(self.directory, self.places):
            return dense.kept_weights(weights)


def _structure(directory: Path, load: LoadSettings, catalog: Catalog) -> Structure:
    """Raises `NotComparable` where a plugin, a library or the leave to run code is missing, which is no damage."""
    try:
        return load_structure(str(directory), catalog, load)
    except LlmprunerError as error:
        if isinstance(error, (PluginError, UnsupportedModelError, MissingExtraError)) or ALLOW in str(error):
            raise NotComparable(str(error)) from error
        raise


def _files(directory: Path) -> Iterator[Check]:
    try:
        record = read_any_record(directory)
        recorded = recorded_files(record)
        if recorded is None:
            what = f"no {RECORD_FILE}" if record is None else f"{RECORD_FILE} is of an earlier version, without hashes"
            yield Check("files", NOT_CHECKED, what)
            return
        damaged = [f"{directory / name} {what}" for name, what in damaged_files(directory, recorded)]
    except CheckpointError as error:
        damaged, recorded = [str(error)], {}
    for line in damaged:
        yield Check("files", DAMAGED, line)
    if not damaged:
        yield Check("files", PASSED, f"SHA-256 of {counted(len(recorded), 'file')} is as recorded")


def _tensors(directory: Path, places: dict[str, str]) -> str:
    if adapter_base(directory) is not None and (directory / ADAPTER_WEIGHTS).is_file():
        places |= dict.fromkeys(names_in(directory / ADAPTER_WEIGHTS), ADAPTER_WEIGHTS)
        return f"{counted(len(places), 'tensor')} in 1 file, as its header says"
    if not has_shards(directory):
        raise CheckpointError(f"{directory} has no safetensors files")
    places |= check_index(directory)
    files = len(set(places.values()))
    return f"{counted(len(places), 'tensor')} in {counted(files, 'file')}, as their headers and the index say"


def _values(directory: Path, places: Mapping[str, str]) -> str:
    for name, file in places.items():
        # Opened for each tensor, so that one at a time is mapped.
        with opened(directory / file) as tensors:
            value = tensors.get_tensor(name)
        if value.is_floating_point() and value.element_size() == 1:
            value = value.to(torch.bfloat16)  # torch has no minimum of 8-bit floats
        if first_not_finite([(name, value)]) is not None:
            raise CheckpointError(f"{directory / file}: tensor '{name}' holds NaN or infinite values")
    return "all are finite"


def _stored_dtype(directory: Path, places: Mapping[str, str]) -> str:
    """The type of most tensors, in which they are compared; float32 for one that commands do not compute in."""
    counts: Counter[str] = Counter()
    for file in sorted(set(places.values())):
        with opened(directory / file) as tensors:
            counts.update(tensors.get_slice(name).get_dtype() for name in tensors.keys())  # noqa: SIM118
    found = [_DTYPES[name] for name, _ in counts.most_common() if name in _DTYPES]
    return found[0] if found else "float32"


def _opened(directory: Path, structure: Structure, load: LoadSettings, catalog: Catalog) -> StreamedWeights:
    """The weights of the checkpoint, layer by layer, once its tensors are those of the structure."""
    reason = why_not_streamed(structure, catalog, load, cuts=False)
    if reason is not None:
        raise NotComparable(f"only weights that can be read layer by layer are compared: {reason}")
    weights = open_weights(structure, catalog, load)
    unknown = sorted(map(str, weights.info["unexpected_keys"]))
    if unknown:
        raise CheckpointError(f"tensor '{unknown[0]}' belongs to no module of the model")
    return weights


class _Placed:
    """Errors that name a tensor, with the file that it is in; anything else that loading raises as one line."""

    def __init__(self, directory: Path, places: Mapping[str, str]) -> None:
        self.directory, self.places = directory, places

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, NotComparable) or not isinstance(error, Exception):
            return
        if not isinstance(error, LlmprunerError):
            # transformers and torch raise exceptions of any type for a damaged configuration.
            raise CheckpointError(f"{self.directory} cannot be opened: {type(error).__name__}: {error}") from error
        named = next((name for name in re.findall(r"'([^']+)'", str(error)) if name in self.places), None)
        if named is not None:
            raise CheckpointError(f"{self.directory / self.places[named]}: {error}") from error


def _base(structure: Structure, named: str | None, load: LoadSettings, catalog: Catalog) -> Base | str:
    """The dense model, or why nothing is compared with it."""
    if not structure.plans:
        return "it was not pruned by llmpruner"
    if named is None and not at_hand(structure):
        return f"the base '{structure.plans[0].base.model}' is not on this machine; name it with --base"
    try:
        return Base(structure, named, load, catalog)
    except LlmprunerError as error:
        if named is not None:  # a mistake of the user, and no damage
            raise
        return str(error)
