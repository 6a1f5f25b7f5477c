"""From a reference to what a runtime is given."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from ..benching.base import BenchSubject
from ..loading.model import Model, Structure, dtype_of, load_model
from ..loading.reference import resolve
from ..plugins.catalog import Catalog
from ..settings import LoadSettings


def bench_subject(
    source: str | Path | Structure,
    catalog: Catalog,
    load: LoadSettings,
    find: Callable[[], Structure],
    *,
    batch: int,
    length: int,
) -> BenchSubject:
    """``source``: a reference, its structure, or a loaded model. ``find``: opens its structure. Raises `ModelError`
    where nothing is at the reference."""
    if isinstance(source, Model):
        loaded, path = source, Path(source.path) if source.path else None
        dtype = loaded.model.dtype
        return BenchSubject(loaded.ref, path, load.device, batch, length, find, lambda: dtype, lambda: loaded)
    ref = source.ref if isinstance(source, Structure) else str(source)
    place = resolve(ref, catalog, revision=load.revision)
    path = place.directory / (place.gguf_file or "") if place.directory.exists() else None
    opened = cache(find)
    return BenchSubject(
        ref, path, load.device, batch, length, opened,
        lambda: dtype_of(opened(), catalog, load), lambda: load_model(ref, catalog, load, opened()),
    )  # fmt: skip
