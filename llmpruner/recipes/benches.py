"""From a reference to what a runtime is given."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

from ..errors import SettingsError
from ..evaluation.speed.base import BenchSubject
from ..models.devices import check_device
from ..models.dtypes import dtype_of
from ..models.in_memory import load_model
from ..models.model import Model, Structure
from ..models.reference import resolve
from ..settings import LoadSettings, flag_of
from .jobs import BenchJob
from .opening import Opener, Source


def check_bench(job: BenchJob, load: LoadSettings) -> None:
    """Raise `LlmprunerError` for a device that cannot be used, and `SettingsError` for options of ``load`` that the
    runtime does not read, as it opens files by itself."""
    check_device(load.device)
    given = sorted(name for name in load.model_fields_set if name != "device")
    if given and not job.runtime.through_transformers:
        flag = flag_of(LoadSettings, given[0])
        raise SettingsError(
            f"{flag} has no effect with --runtime {job.runtime.name}, which opens files by itself; leave it out"
        )


def bench_subject(source: Source, opener: Opener, *, batch: int, length: int) -> BenchSubject:
    """Raises `ModelError` where nothing is at the reference."""
    catalog, load, find = opener.catalog, opener.load, partial(opener.structure, source)
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
