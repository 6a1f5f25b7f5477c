"""What a result depends on: the files of a model, and the data files that settings name.

Interrupted runs, steps of recipes and kept measurements compare these to tell whether they may be used again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..component import Component
from .record import OF_THIS_MACHINE, sampled_sha256, sha256
from .reference import adapter_base, resolve

if TYPE_CHECKING:
    from ..plugins.catalog import Catalog


def model_identity(ref: str, catalog: Catalog, commit: str | None = None) -> str | None:
    """A digest of the files of a model, of adapters with their base, or of the ``commit`` of a hub model if known."""
    files = _model_files(ref, commit, catalog)
    return None if files is None else hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _model_files(ref: str, commit: str | None, catalog: Catalog) -> dict[str, Any] | None:
    place = resolve(ref, catalog)
    folder = place.directory
    if place.gguf_file:
        files = [folder / place.gguf_file]
    elif folder.is_dir():
        files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name[0] != "."]
        files = [file for file in files if file.suffix not in (".md", ".log") and file.name not in OF_THIS_MACHINE]
    elif folder.exists():
        files = [folder]
    else:
        return None if commit is None else {"hub": ref, "commit": commit}
    sums: dict[str, Any] = {file.name: sampled_sha256(file) for file in files}
    base = adapter_base(folder)
    if base is None:
        return sums
    base_sums = _model_files(base, commit, catalog)
    return None if base_sums is None else {**sums, "base of the adapter": base_sums}


def data_identity(*values: Any) -> dict[str, str]:
    """Path → SHA-256 of every file that ``values`` name: settings, components, or jobs, which are made of them."""
    return {str(file): sha256(file) for file in sorted(set(_files_named(values)))}


def _files_named(value: Any) -> Iterator[Path]:
    """Data is named by a file, several with commas between them, with shares (``3*FILE``), and after the name of a
    calibration source (``NAME:FILE``). A path of a folder stands for all files in it."""
    if isinstance(value, Component):
        value = value.settings.model_dump()
    if is_dataclass(value) and not isinstance(value, type):
        value = tuple(getattr(value, field.name) for field in fields(value))
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for element in value:
            yield from _files_named(element)
    elif isinstance(value, Path) and value.is_dir():
        yield from (file for file in value.rglob("*") if file.is_file())
    elif isinstance(value, (str, Path)):
        text = str(value)
        for part in (text, *re.split(r"\s*,\s*", text)):
            share = re.fullmatch(r"\d+(?:\.\d+)?\*(.+)", part, re.S)
            name = share[1] if share else part
            yield from (Path(path) for path in (name, name.partition(":")[2]) if path and isfile(path))
