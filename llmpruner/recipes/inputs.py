"""What the result of a step depends on, as JSON values: when they are as before, the step need not be done again."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..component import Component
from ..files import is_file
from ..models.checkpoint import adapter_base
from ..models.record import OF_THIS_MACHINE
from ..models.reference import resolve
from ..settings import LoadSettings

if TYPE_CHECKING:
    from ..models.model import Structure
    from ..models.reference import Reference
    from ..plugins.catalog import Catalog
    from .recipe import Step
    from .state import Hashes

_LIBRARIES = ("torch", "transformers")
"""On whose versions the results of all commands depend."""
_NO_WEIGHTS = (".md", ".log")
_HUB, _BASE = "hub", "base of the adapter"


def inputs_of(
    step: Step, job: Any, models: Mapping[str, Any], load: LoadSettings, family: str, catalog: Catalog, hashes: Hashes
) -> dict[str, Any]:
    """``models``: name → fingerprint of each model that the step reads. ``family``: of the model."""
    found: dict[str, Any] = {
        "command": step.command.name,
        "settings": step.settings.model_dump(mode="json"),
        "load": load.model_dump(mode="json"),
        "models": dict(models),
        "data": data_fingerprint([step.settings.model_dump(), named_by(job)], hashes),
        "versions": _versions(step, job, family, catalog),
    }
    return found if step.prompt is None else {**found, "prompt": step.prompt}


def data_fingerprint(settings: Any, hashes: Callable[[Path], str]) -> dict[str, str]:
    """What ``hashes`` gives of every file that ``settings`` name."""
    return {str(file): hashes(file) for file in sorted(set(files_in(settings)))}


def named_by(job: Any) -> list[Any]:
    """The values of a job that may name files: the settings of its components, and its calibration text. What a method
    gives (``calibration``) is in no settings of the user."""
    text = getattr(getattr(job, "calibration", None), "text", None)
    return [*([] if text is None else [text.text]), *(component.record() for component in components_in(job))]


def files_in(value: Any) -> Iterator[Path]:
    """The files that a setting names, in any of the ways of naming data: alone, several with commas between them, with
    shares (``3*FILE``), and after the name of a calibration source (``NAME:FILE``); of a folder that is given as a
    path, all files."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, Path) and value.is_dir():
        yield from (file for file in value.rglob("*") if file.is_file())
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from files_in(one)
    elif isinstance(value, (str, Path)):
        text = str(value)
        for part in (text, *re.split(r"\s*,\s*", text)):
            share = re.fullmatch(r"\d+(?:\.\d+)?\*(.+)", part, re.S)
            name = share[1] if share else part
            yield from (Path(found) for found in (name, name.partition(":")[2]) if found and is_file(found))


def model_fingerprint(structure: Structure, catalog: Catalog, hashes: Callable[[Path], str]) -> dict[str, Any]:
    """What ``hashes`` gives of the files of a local model, by name, and of those of its base where it is an adapter; of
    a model of the hub, its commit."""
    return _of_model(structure.ref, getattr(structure.config, "_commit_hash", None), catalog, hashes)


def _of_model(ref: str, commit: str | None, catalog: Catalog, hashes: Callable[[Path], str]) -> dict[str, Any]:
    place = resolve(ref, catalog)
    if not place.gguf_file and not place.directory.exists():
        return {_HUB: ref, "commit": commit}
    found: dict[str, Any] = {file.name: hashes(file) for file in _files(place)}
    base = adapter_base(place.directory) if place.directory.is_dir() else None
    # An adapter's files may have the names of those of its base, which may be one too.
    return found if base is None else {**found, _BASE: _of_model(base, commit, catalog, hashes)}


def _files(place: Reference) -> list[Path]:
    if place.gguf_file:
        return [place.directory / place.gguf_file]
    if place.directory.is_file():
        return [place.directory]
    found = (file for file in sorted(place.directory.iterdir()) if file.is_file() and not file.name.startswith("."))
    return [file for file in found if file.suffix not in _NO_WEIGHTS and file.name not in OF_THIS_MACHINE]


def digest(fingerprint: Mapping[str, Any]) -> str:
    """A fingerprint as one short value."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def _versions(step: Step, job: Any, family: str, catalog: Catalog) -> dict[str, str]:
    packages = {catalog.families.package_of(family)} if family in catalog.families else set()
    for component in components_in(job):
        registry = catalog.registry(component.kind)
        # A component that no hook gives is part of llmpruner.
        packages |= {registry.package_of(component.name)} if component.name in registry else set()
    found = {name: _version(name) for name in sorted({*_LIBRARIES, *step.command.libraries, *packages} - {"llmpruner"})}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"llmpruner": __version__, "python": python, **{name: v for name, v in found.items() if v is not None}}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def components_in(job: Any) -> Iterator[Component]:
    """All components of a job."""
    if isinstance(job, Component):
        yield job
    elif isinstance(job, (tuple, list)):
        for one in job:
            yield from components_in(one)
    elif is_dataclass(job) and not isinstance(job, type):
        for field in fields(job):
            yield from components_in(getattr(job, field.name))


def first_change(before: Any, now: Any, path: str = "") -> str:
    """The first difference of two inputs, in words; empty where there is none."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            inside = f"{path}.{key}" if path else str(key)
            if (key in before) != (key in now):
                return f"{inside} {'was added' if key in now else 'is gone'}"
            if found := first_change(before[key], now[key], inside):
                return found
        return ""
    if before == now:
        return ""
    if any(isinstance(one, str) and re.fullmatch(r"[0-9a-f]{64}", one) for one in (before, now)):
        return f"{path} has changed"
    return f"{path} was {before}, is {now}"
