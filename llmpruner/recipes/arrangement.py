"""What a long run settles before it starts: how the model is held, and where the results of finished steps are kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from .. import __version__
from ..engine.journal import Journal
from ..engine.ranks import Ranks
from ..models.identity import data_identity, model_identity
from ..models.model import Structure
from ..progress import QUIET
from ..settings import RunSettings
from ..structure.plan import PruningPlan
from .fitting import boundary_limit
from .forecast import SLOW_WRITING, Residency, duration
from .opening import Opener
from .residency import arranged, is_streamed, weight_bytes
from .work import Work

if TYPE_CHECKING:
    from ..settings import PruneSettings, SensitivitySettings
    from .jobs import PruneJob

_SMALL = 1 << 28
"""Bytes of weights: with fewer, a forecast without a reader takes more time than it is worth."""


def arrange(
    opener: Opener,
    opened: Structure,
    job: PruneJob | None,
    work: Work,
    run: RunSettings,
    *,
    whole: str | None = None,
) -> tuple[Residency, Mapping[str, Any] | None]:
    """How the model is held, and the forecast, which is shown; None for a small model where nobody would read it.
    ``job``: None for a plan that is replayed. ``whole``: what needs the model in memory."""
    load, catalog, progress = opener.load, opener.catalog, opener.progress
    if progress is QUIET and run.max_memory is None and weight_bytes(opened, load, catalog) < _SMALL:
        # A forecast takes a second.
        limit = boundary_limit(run)
        streamed = whole is None and is_streamed(opened, job, load, catalog)
        return Residency(streamed, limit), None
    found = arranged(opened, job, work, load, run, catalog, whole=whole)
    progress.status(str(found))
    writing = found.stage("writing")
    if writing is not None and writing.seconds is not None and writing.seconds > SLOW_WRITING:
        progress.status(
            f"writing the calibration text takes about {duration(writing.seconds)}; --calibration FILE avoids it"
        )
    return found.residency, found.as_json()


def journal_for(
    output: Path,
    opener: Opener,
    opened: Structure,
    what: PruningPlan | PruneSettings | SensitivitySettings,
    divided: int,
    ranks: Ranks,
    *,
    job: PruneJob | None,
    ending: str,
    restart: bool,
) -> Journal:
    """The journal of a run, in a folder beside ``output``. The run is identified by all that the result, and the shapes
    of hidden states, depend on. ``job``: what ``what`` was turned into; None for a plan. ``divided``: see `Residency`.
    ``restart``: whether what is in it is removed."""
    folder = output.with_name(output.name + ending)
    named = what.compensation and what.compensation.calibration if isinstance(what, PruningPlan) else what.model_dump()
    return Journal(
        folder,
        {
            "model": opened.path or opened.ref,
            "files": model_identity(opened, opener.catalog),
            "data": data_identity(named, job),
            "prune": what.model_dump(mode="json"),
            "load": opener.load.model_dump(mode="json"),
            "micro-batches divided by": divided,
            "versions": [__version__, torch.__version__, transformers.__version__],
        },
        ranks,
        anew=restart,
    )
