"""From settings to the jobs of commands other than ``prune``, whose job is in `pruning.job`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ..errors import SettingsError
from ..evaluation.base import Metric
from ..evaluation.runtime import Runtime
from ..exporters import Exporter
from ..plugins.catalog import Catalog
from ..recovery.base import RecoveryStrategy
from ..report.base import ReportSection
from ..settings import (
    BenchSettings,
    EvaluateSettings,
    ExportSettings,
    PageSettings,
    RecoverSettings,
)
from .given import Given


@dataclass(frozen=True)
class RecoverJob:
    """A strategy with its settings, and the settings that all strategies share. ``instead``: where the user names no
    strategy, the one for models with which ``strategy`` cannot be used, see `default_strategy.with_strategy`."""

    strategy: RecoveryStrategy
    settings: RecoverSettings
    instead: RecoveryStrategy | None = None


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


_WHOLE_MODEL = (
    "minutes", "gradient_checkpointing", "validation", "validation_data", "eval_steps", "patience", "report_to"
)  # fmt: skip
"""Settings of a training of the whole model."""


def recover_job(settings: RecoverSettings, catalog: Catalog) -> RecoverJob:
    """Raises `SettingsError` (or `UnknownNameError`) for settings that are wrong or have no effect together."""
    given, instead = Given(settings), None
    name = settings.strategy
    if name is None:
        adapters = "lora" in settings.settings or any(map(given.has, ("rank", "alpha", "dropout", "merge")))
        name = "lora" if adapters else "distil"
        # Settings for distillation ask for it.
        instead = None if name in settings.settings or adapters else catalog.strategies["lora"]()
    strategy = given.create("strategy", catalog.strategies, name)
    for name in ("max_steps", "minutes"):
        if given.has(name):
            given.refuse("epochs", f"with {given.flag(name)}, which sets the number of steps")
    _check_validation(given, settings)
    _check_trackers(settings)
    if settings.micro_batch_size > settings.batch_size:
        given.refuse("micro_batch_size", f"beyond the {settings.batch_size} examples of --batch-size")
    if strategy.by_layer:
        for name in _WHOLE_MODEL:
            given.refuse(name, f"with {strategy.label()}, which trains one layer after the other")
        settings = settings.model_copy(update={"validation": 0})
    if not strategy.adapters:
        given.refuse("merge", f"with {strategy.label()}, which trains no adapters")
    given.check_all_used()
    return RecoverJob(strategy, settings, instead)


def _check_validation(given: Given, settings: RecoverSettings) -> None:
    if settings.validation_data is not None:
        given.refuse("validation", "with --validation-data, which is all that is validated on")
    elif settings.validation == 0:
        for name in ("eval_steps", "patience"):
            given.refuse(name, "with --validation 0, which turns validation off")


def _check_trackers(settings: RecoverSettings) -> None:
    """Raise `SettingsError` for a program of ``--report-to`` that is not installed."""
    for name in settings.report_to or ():
        if find_spec(name) is None:
            raise SettingsError(f"--report-to {name}: {name} is not installed; run: pip install {name}")


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
