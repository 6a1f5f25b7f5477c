"""From settings to the jobs of commands other than ``prune``, whose job is in `pruning.job`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import SettingsError
from ..evaluation.base import Metric
from ..evaluation.runtime import Runtime
from ..exporters import Exporter
from ..plugins.catalog import Catalog
from ..report.base import ReportSection
from ..settings import (
    BenchSettings,
    EvaluateSettings,
    ExportSettings,
    PageSettings,
)
from .given import Given


@dataclass(frozen=True)
class EvaluateJob:
    """The metrics to measure, in the order of their columns."""

    metrics: tuple[Metric, ...]


@dataclass(frozen=True)
class BenchJob:
    """A runtime, and the sizes to measure: every batch size with every length of prompt. ``new``: tokens to decode."""

    runtime: Runtime
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    new: int
    rounds: int


def evaluate_job(settings: EvaluateSettings, catalog: Catalog) -> EvaluateJob:
    """The metrics to measure: always the size, and perplexity on Python's help topics when nothing is named. Raises
    `SettingsError` (or `UnknownNameError`) for settings that are wrong."""
    chosen: dict[str, dict[str, Any]] = {"size": {}}
    if settings.perplexity is not None or settings.window is not None or settings.kl:
        chosen["perplexity"] = {} if settings.perplexity is None else {"text": settings.perplexity}
    if settings.tasks is not None:
        chosen["tasks"] = {"names": settings.tasks}
    elif settings.limit is not None:
        raise SettingsError("--limit is of --tasks; name tasks")
    if settings.speed:
        chosen["speed"] = {}
    for name in settings.metrics or ():
        chosen.setdefault(name, {})
    if len(chosen) == 1 and not settings.metrics:
        chosen["perplexity"] = {}
    given = Given(settings, chosen)
    metrics = tuple(given.create(name, catalog.metrics, name) for name in chosen)
    given.check_all_used()
    return EvaluateJob(metrics)


def bench_job(settings: BenchSettings, catalog: Catalog) -> BenchJob:
    """Raises `SettingsError` (or `UnknownNameError`) for settings that are wrong or have no effect."""
    given = Given(settings)
    runtime = given.create("runtime", catalog.runtimes, settings.runtime)
    given.check_all_used()
    return BenchJob(runtime, settings.batch, settings.prompt, settings.new, settings.rounds)


def page_job(settings: PageSettings, catalog: Catalog) -> tuple[ReportSection, ...]:
    """The sections of a page. Raises `SettingsError` for settings that are wrong or of no section."""
    given = Given(settings)
    sections = tuple(given.create("sections", catalog.sections, name) for name in catalog.sections)
    given.check_all_used()
    return sections


def export_job(settings: ExportSettings, catalog: Catalog) -> Exporter:
    """Raises `SettingsError` (or `UnknownNameError`) for settings that are wrong or have no effect."""
    given = Given(settings)
    exporter = given.create("to", catalog.exporters, settings.to)
    given.check_all_used()
    return exporter
