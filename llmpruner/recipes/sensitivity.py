"""Measuring how much cuts of each group alone change the predictions, point by point."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .. import __version__
from ..engine.journal import Journal
from ..engine.ranks import Ranks
from ..errors import OutputError, SettingsError
from ..files import check_unused_file, write_text
from ..models.model import Model, Structure
from ..progress import QUIET, Progress
from ..pruning.allocation.curve import Curve, GroupCurve, Point
from ..pruning.allocation.uniform import Uniform
from ..pruning.compensation.trials import Trials
from ..pruning.criteria.estimate import estimate
from ..report.sensitivity import sensitivity_plot
from ..settings import RunSettings
from ..structure.queues import Queue, build_queue, kept_units
from ..values import counted
from .arrangement import arrange, journal_for
from .calibrating import journaled, scored_on
from .checks import check_prune
from .doubts import use_of
from .execution import Run
from .jobs import sensitivity_job
from .wanted import scope_of, widths_of
from .work import work_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..settings import SensitivitySettings
    from .jobs import PruneJob
    from .opening import Opener, Source


def sensitivity_of(
    source: Source, settings: SensitivitySettings, output: Path | None, opener: Opener, *, restart: bool
) -> Curve:
    """The curve, written to ``output`` with a plot beside it. Raises as `llmpruner.sensitivity`."""
    job, progress = sensitivity_job(settings, opener.catalog), opener.progress
    file = None if output is None else check_unused_file(output)
    if file is not None and file.suffix != ".json":
        raise OutputError(f"'{file}': the curve is written as JSON, and its plot beside it; name a .json file")
    if restart and file is None:
        raise SettingsError("restart has no effect without an output, beside which points are kept; leave it out")
    opened = opener.structure(source)
    # One group has a curve, although a prune has nothing to divide between groups.
    check_prune(replace(job, allocation=Uniform()), opened, tokenizer=opener.has_tokenizer(opened))
    cuts = planned_cuts(opened, job, settings.shares)
    work = replace(work_of(job, opened, saves=False), trials=len(cuts))
    arrange(opener, opened, job, work, RunSettings(), whole="measuring cuts")
    progress.status(f"{counted(len(cuts), 'cut')} to measure")
    journal = None
    if file is not None and not isinstance(opened, Model):
        journal = journal_for(
            file, opener, opened, settings, 1, Ranks.current(), job=job, ending=".measuring", restart=restart
        )  # fmt: skip
    use = use_of(job, opened, opener.catalog)
    known = {"structure": use.structure, **({} if use.files is None else {"files": use.files})}
    with ExitStack() as stack:
        if journal is not None:
            stack.enter_context(journal.alone())
        loaded = opener.weights(opened)
        try:
            curve = measure_curve(loaded, job, settings.shares, progress, journal)
        except KeyboardInterrupt:
            if journal is not None and journal.kept:
                progress.status(
                    f"stopped; the same command goes on with what is measured ({journal.folder}), or --restart"
                )
            raise
        curve = replace(curve, measured={**curve.measured, **known})
        if journal is not None:
            journal.check()
        if file is not None:
            write_text(file, json.dumps(curve.as_json(), indent=1, ensure_ascii=False) + "\n")
            write_text(file.with_suffix(".svg"), sensitivity_plot(curve) + "\n")
        if journal is not None:
            journal.remove()
    return curve


@dataclass(frozen=True)
class Cut:
    """A cut of one group to measure: ``steps`` of its queue, which remove ``removed`` units."""

    group: str
    steps: int
    removed: int


def cuts_to_measure(queues: Sequence[Queue], shares: Sequence[float]) -> list[Cut]:
    """For each group the cuts nearest to the shares of its units, each once; none that removes nothing."""
    found: dict[Cut, None] = {}
    for queue in queues:
        for share in shares:
            steps = queue.steps_for(share * queue.group.units)
            if steps:
                found[Cut(queue.group.name, steps, queue.removed_after(steps))] = None
    return list(found)


def planned_cuts(structure: Structure, job: PruneJob, shares: Sequence[float]) -> list[Cut]:
    """`cuts_to_measure` before there are scores."""
    scope, widths = scope_of(job, structure), widths_of(job, structure)
    groups = scope.groups(structure.graph)
    queues = [
        build_queue(g, [0.0] * g.units, allowed=scope.allowed_units(g), multiple=widths.multiple(g)) for g in groups
    ]
    return cuts_to_measure(queues, shares)


def measure_curve(
    model: Model, job: PruneJob, shares: Sequence[float], progress: Progress = QUIET, journal: Journal | None = None
) -> Curve:
    """The divergence of the model after each cut from the model as it is; see `Trials`. Every point is written to
    ``journal`` at once, and those that an interrupted run wrote are not measured again."""
    scope, widths, graph = scope_of(job, model), widths_of(job, model), model.graph
    groups, run = scope.groups(graph), Run(journal=journal)
    text = journaled(journal, model, job, progress, run.ranks)
    assert text is not None
    scores = estimate(
        model.model, graph, groups, job.criterion, scored_on(text, job),
        reduction=job.reduction, seed=job.seed, progress=progress, executor=run.executor(model),
    )  # fmt: skip
    queues = {
        g.name: build_queue(
            g, scores.by_group[g.name].tolist(), allowed=scope.allowed_units(g), multiple=widths.multiple(g)
        )
        for g in groups
    }
    refit = job.compensation.ranks_again
    trials = Trials(model.model, graph, groups, model.family, text, refit=refit, progress=progress)
    cuts = cuts_to_measure(list(queues.values()), shares)
    points: dict[str, list[Point]] = {}
    with progress.bar("measuring cuts") as at:
        for number, cut in enumerate(cuts, start=1):
            value = _measured(cut, queues[cut.group], trials, journal)
            points.setdefault(cut.group, []).append(Point(cut.removed, value))
            at(number / len(cuts), cut.group)
    curves = [GroupCurve(g.name, g.kind, g.layer, g.units, tuple(points[g.name])) for g in groups if g.name in points]
    return Curve(
        tuple(curves),
        {
            "model": model.ref,
            "criterion": job.criterion.name,
            "compensation": job.compensation.name,
            "calibration": text.source,
            "fingerprint": text.fingerprint,
            "tokens": sum(ids.numel() for ids in trials.tried),
            "seed": job.seed,
            "llmpruner": __version__,
        },
    )


def _measured(cut: Cut, queue: Queue, trials: Trials, journal: Journal | None) -> float:
    name = f"{cut.group}-{cut.removed}"
    earlier = None if journal is None else journal.load(name)
    if earlier is not None:
        return float(earlier)
    found = trials.loss(kept_units([queue], {cut.group: cut.steps}))
    if journal is not None:
        journal.store(name, found)
    return found
