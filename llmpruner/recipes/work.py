"""What memory and time of a prune depend on, beside the model and the machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from typing import TYPE_CHECKING

from ..calibration.calibration import parse_calibration
from ..calibration.self_written import SelfWritten
from ..calibration.written_chats import ANSWER_TOKENS, QUESTION_TOKENS, WRITTEN_TOKENS
from ..engine.position import positions
from ..engine.signals import GRADIENTS, Signal
from ..pruning.compensation.choose import can_wait
from ..pruning.criteria.estimate import scored_parameters
from ..structure.coupling import Role
from .calibrating import GRADIENT_TOKENS, length_for
from .wanted import scope_of

if TYPE_CHECKING:
    from ..calibration.calibration import CalibrationText
    from ..models.model import Structure
    from ..plugins.catalog import Catalog
    from ..pruning.criteria.base import ImportanceCriterion
    from ..structure.coupling import CoupledGroup, CouplingGraph
    from ..structure.kept import Kept
    from ..structure.plan import PruningPlan
    from .jobs import PruneJob


@dataclass(frozen=True)
class Written:
    """Calibration text that the model writes: passages of at most ``tokens`` tokens, ``batch`` at a time."""

    passages: int
    tokens: int
    batch: int


@dataclass(frozen=True)
class Work:
    """What memory and time of a prune depend on, beside the model and the machine.

    ``samples`` × ``length`` calibration tokens, of which the first ``scored`` are used for scores. ``signals`` of the
    parameters ``names``; none for a replayed plan. ``kept``: as planned, or the numbers that equal shares give.
    ``fits``: whether a compensation reads text; ``chooses``: whether units are chosen in it; ``changed``: the groups
    whose readers it fits; ``weighted``: whether it weighs tokens first; ``mixed``: whether fits choose their targets;
    ``holds_out_sources``: whether sources of the text are held out in turn. ``trials``: runs of cut copies, in
    all steps.
    ``by_matrix``: whether one matrix of a stack is scored at a time. ``measured``: parameter → how many numbers the
    criterion keeps of its products in the backward pass.
    """

    samples: int = 0
    length: int = 0
    written: tuple[Written, ...] = ()
    signals: frozenset[Signal] = frozenset()
    names: frozenset[str] = frozenset()
    scored: int = 0
    kept: Kept = field(default_factory=dict)
    fits: bool = False
    chooses: bool = False
    changed: tuple[str, ...] = ()
    weighted: bool = False
    mixed: bool = False
    holds_out_sources: bool = False
    steps: int = 1
    trials: int = 0
    saves: bool = True
    by_matrix: bool = False
    measured: Mapping[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @property
    def gradients(self) -> bool:
        return bool(self.signals & GRADIENTS)

    @property
    def exact(self) -> bool:
        """Whether gradients are computed in the model's own precision (see `GradientWalk`)."""
        return bool(self.signals & GRADIENTS - {Signal.PRODUCT_GRAD})


def work_of(job: PruneJob, structure: Structure, *, saves: bool) -> Work:
    """The work of making a plan and, with ``saves``, of applying it."""
    graph = structure.graph
    groups = scope_of(job, structure).groups(graph)
    text, samples, length = job.calibration, 0, 0
    written: tuple[Written, ...] = ()
    if text is not None:
        samples, length = text.samples, length_for(text, structure)
        written = _written(text.text, samples, length)
    chooses = (
        job.compensation.ranks_again
        and job.allocation.equal_shares
        and job.steps == 1
        and can_wait(job.criterion, graph, groups)
    )
    reads = bool(job.criterion.signals - {Signal.WEIGHT})
    limited = job.compensation.ranks_again and bool(job.criterion.signals & GRADIENTS)
    scored = min(samples, max(1, GRADIENT_TOKENS // max(length, 1))) if limited else samples
    if chooses and saves:
        scored = 0
    stream = bool(job.criterion.signals & {Signal.STREAM, Signal.STREAM_BLOCKS})
    kept = _equal_shares(job, structure, groups)
    names = frozenset() if stream else frozenset(scored_parameters(graph, groups, job.criterion))
    return Work(
        samples=samples,
        length=length,
        written=written,
        signals=job.criterion.signals,
        names=names,
        scored=scored * length if reads else 0,
        kept=kept,
        fits=saves and job.compensation.reads_text,
        chooses=chooses,
        changed=tuple(job.compensation.changed_groups(graph, kept)),
        weighted=job.compensation.weighs_tokens,
        mixed=job.compensation.chooses_target,
        holds_out_sources=job.compensation.holds_out_sources,
        steps=job.steps,
        trials=3 * len(groups) * _measured_steps(job) if job.allocation.measures else 0,
        saves=saves,
        by_matrix=job.criterion.by_matrix,
        measured=_measured(graph, names, job.criterion) if Signal.PRODUCT_GRAD in job.criterion.signals else {},
    )


def _measured_steps(job: PruneJob) -> int:
    """Of how many steps an allocation measures cuts: where it divides the amount once, of the first, in which it does,
    and of the last, in which the rest goes."""
    return min(job.steps, 2) if job.allocation.shares_once else job.steps


def _measured(graph: CouplingGraph, names: Collection[str], criterion: ImportanceCriterion) -> dict[str, int]:
    where = positions(graph)
    axes = {span.parameter: span.axis for group in graph.groups for span in group.spans_with(Role.CONSUMES)}
    found = {}
    for name in names:
        shape = graph.shapes[name]
        if len(shape) > 1:
            each = criterion.measured_values(where[name], shape[axes.get(name, len(shape) - 1)])
            found[name] = each * prod(shape[:-2])
    return found


def work_of_plan(plan: PruningPlan, graph: CouplingGraph, catalog: Catalog, *, saves: bool) -> Work:
    """The work of replaying a plan."""
    how = plan.compensation
    if how is None or how.calibration is None or not how.samples or not how.length:
        return Work(kept=plan.kept, saves=saves)
    text = parse_calibration(how.calibration, catalog.sources, how.source_settings)
    written = _written(text, how.samples, how.length)
    compensation = catalog.create(catalog.compensations, how.name, how.settings)
    return Work(
        how.samples, how.length, written, kept=plan.kept, fits=True, saves=saves,
        changed=tuple(compensation.changed_groups(graph, plan.kept)), weighted=compensation.weighs_tokens,
        mixed=compensation.chooses_target, holds_out_sources=compensation.holds_out_sources,
    )  # fmt: skip


def _written(text: CalibrationText, samples: int, length: int) -> tuple[Written, ...]:
    """The passages of those parts that the model writes, as `self_generated` cuts them, and their conversations, at
    most as many as `written_chats` needs."""
    found = []
    order = text.order(samples)
    for number, part in enumerate(text.parts):
        if not part.source.writes:
            continue
        share = -(-samples // len(text.parts)) if part.share is None else order.count(number)
        passage, batch, chats = (getattr(part.source.settings, key, default) for key, default in _SETTINGS.items())
        in_chats = round(share * chats)
        if in_chats:
            wanted = ceil(in_chats * length / WRITTEN_TOKENS)
            found.append(Written(wanted, QUESTION_TOKENS + ANSWER_TOKENS, min(ceil(batch / 2), wanted)))
        if share > in_chats:
            parts = -(-length // passage)
            rows = (share - in_chats) * parts
            found.append(Written(rows, -(-length // parts), min(batch, rows)))
    return tuple(found)


_SETTINGS = {name: SelfWritten.Settings.model_fields[name].default for name in ("passage", "batch", "chats")}
"""Settings of the built-in source, for sources that write text and do not have them."""


def _equal_shares(job: PruneJob, structure: Structure, groups: Sequence[CoupledGroup]) -> Kept:
    """The first units of every group, as many as stay with equal shares."""
    graph = structure.graph
    saving = sum(graph.parameters_per_unit(group) * group.units for group in groups) or 1
    if job.by == "units":
        share = job.amount
    elif job.by == "ratio":
        share = job.amount * graph.decoder_parameters / saving
    else:
        share = (graph.total_parameters - job.amount) / saving
    return {g.name: tuple(range(max(g.minimum, ceil(g.units * (1 - min(share, 1)))))) for g in groups}
