"""What a step will take, before it is done: of a prune memory, disk and time; of a training steps and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..amounts import counted
from ..calibration.mixture import parse_mixture
from ..models.tokenizer import load_tokenizer
from ..recovery.schedule import steps, with_batch
from ..recovery.training_data import prepare
from .residency import arranged
from .work import work_of

if TYPE_CHECKING:
    from ..models.model import Structure
    from ..plugins.catalog import Catalog
    from ..settings import LoadSettings, RunSettings
    from .jobs import RecoverJob
    from .recipe import Step


def step_forecast(
    step: Step,
    job: Any,
    source: Structure | None,
    dense: Structure,
    load: LoadSettings,
    run: RunSettings,
    catalog: Catalog,
) -> tuple[str, dict[str, Any]]:
    """In words, and as JSON values; both empty where nothing is known before. ``source``: the model that the step
    reads, None where it does not exist yet. Reads no weights. Raises `SettingsError` where ``run.max_memory`` is too
    little."""
    if step.command.name == "prune" and source is not None:
        found = arranged(source, job, work_of(job, source, saves=True), load, run, catalog)
        return str(found), found.as_json()
    if step.command.name == "recover":
        return _training(job, dense, load, catalog)
    return "", {}


def _training(job: RecoverJob, dense: Structure, load: LoadSettings, catalog: Catalog) -> tuple[str, dict[str, Any]]:
    """Steps, and tokens in them, padding aside. Data that would have to be downloaded is not read. Of a strategy that
    trains layer by layer, what each layer of the dense model takes."""
    settings, layers = job.settings, dense.graph.num_layers if job.strategy.by_layer else 1
    if settings.minutes is not None:
        return f"as many steps as fit into {counted(settings.minutes, 'minute')}", {"minutes": settings.minutes}
    if not all(Path(part.source).is_file() for part in parse_mixture(settings.data)):
        if settings.max_steps is None:
            return f"{counted(settings.epochs, 'epoch')} of {settings.data}, which is not read before", {}
        return counted(settings.max_steps, "step"), {"steps": settings.max_steps}
    rows = prepare(settings, dense.family, load_tokenizer(dense, catalog, load)).rows.rows
    settings = with_batch(settings, lambda one: steps(one, len(rows)), processes=1)
    # A limit of steps is one of all layers together.
    total = steps(settings, len(rows)) * (layers if settings.max_steps is None else 1)
    count = -(-total // layers)
    epoch = sum(len(row["input_ids"]) for row in rows)
    # The last batch of an epoch may be smaller.
    shown = settings.epochs if settings.max_steps is None else count * settings.batch_size / len(rows)
    tokens = round(epoch * shown)
    facts = {"examples": len(rows), "steps": total, "tokens": tokens}
    each = f" in each of {layers} layers" if layers > 1 else ""
    over = f"over {counted(len(rows), 'example')}, about {counted(tokens, 'token')}"
    return f"{counted(count, 'step')}{each} {over}", facts
