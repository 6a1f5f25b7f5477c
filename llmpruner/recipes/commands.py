"""The commands that a recipe can run: their settings, and what is refused before any begins. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..catalog import Catalog
from ..errors import not_pruned
from ..evaluation.bench import Runtime, bench_subject
from ..evaluation.evaluate import chosen_metrics
from ..exporters import Exporter
from ..pruning.job import check_data, prune_job
from ..recovery.data import check_setup, recovery_setup
from ..settings import (
    BenchSettings,
    EvaluateSettings,
    ExportSettings,
    GenerateSettings,
    PruneSettings,
    RecoverSettings,
    Settings,
)

if TYPE_CHECKING:
    from ..discovery.opening import Opener
    from ..models.model import Structure


class StepKind(NamedTuple):
    """A command that a step can run."""

    settings: type[Settings]
    create: Callable[[Any, Catalog], Any]
    """Makes the job of the settings, and refuses those that contradict each other."""
    check: Callable[[Any], object] = lambda job: None
    """Refuses a job whose data or libraries are missing."""
    check_model: Callable[[Any, Any, Structure, Opener], object] = lambda job, settings, model, opener: None
    """Refuses a job that the model does not allow, as far as that is seen without weights."""


def _check_prune(job: Any, settings: Any, model: Structure, opener: Opener) -> None:
    from ..pruning.checks import check_job  # imports torch

    check_job(job, model, opener)


def _check_recover(job: Any, settings: Any, model: Structure, opener: Opener) -> None:
    if job.reads_dense and not model.plans:
        raise not_pruned(model.ref)


COMMANDS: Final[Mapping[str, StepKind]] = {
    "prune": StepKind(PruneSettings, prune_job, check_data, _check_prune),
    "recover": StepKind(RecoverSettings, recovery_setup, check_setup, _check_recover),
    "evaluate": StepKind(EvaluateSettings, chosen_metrics, lambda metrics: [metric.prepare() for metric in metrics]),
    "bench": StepKind(
        BenchSettings,
        lambda s, catalog: catalog[Runtime].create_only(s.runtime, s.settings),
        check_model=lambda runtime, s, model, opener: runtime.check(bench_subject(model, s, opener)),
    ),
    "generate": StepKind(GenerateSettings, lambda s, catalog: s),
    "export": StepKind(
        ExportSettings,
        lambda s, catalog: catalog[Exporter].create_only(s.to, s.settings),
        lambda exporter: exporter.check(),
    ),
}
MEASURES: Final = ("evaluate", "bench", "generate")
"""Commands that read several models: the dense one and all checkpoints so far, or those under ``models``."""
