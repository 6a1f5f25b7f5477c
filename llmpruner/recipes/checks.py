"""What can be refused once the structure of a model is known, before its weights are read or text is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..budgets.base import BudgetSubject
from ..budgets.costs import saving_units
from ..errors import DataError, ModelError, SelectionError, SettingsError
from ..importance.estimate import check_accepted
from ..models.empty import meta_model
from ..selection.base import AllocationTask, Meter
from ..structure.queues import build_queue
from .jobs import PruneJob
from .pipeline import demand, length_for, scope_of

if TYPE_CHECKING:
    from ..budgets.costs import Cost
    from ..loading.model import Structure
    from ..structure.coupling import CoupledGroup, Span


def check_prune(job: PruneJob, structure: Structure, *, tokenizer: bool) -> None:
    """Raise for kinds and layers that the model does not have, for text that cannot be read, and for an amount or a
    rounding that its groups cannot give. ``tokenizer``: whether the model brings one."""
    scope = scope_of(job, structure)
    groups = scope.groups(structure.graph)
    check_accepted(job.criterion, groups, structure.graph)
    if job.fixed_reduction and all(len(_scored(job, group)) == 1 for group in groups if not group.modules):
        raise SettingsError(
            f"--reduction has no effect: {job.criterion.label()} scores one span of every group; leave it out"
        )
    _check_calibration(job, structure, tokenizer=tokenizer)
    cost = _cost(job, structure)
    if cost is None:
        return
    allowed = {group.name: scope.allowed_units(group) for group in groups}
    if job.by != "units":
        allowed = saving_units(cost, groups, allowed)
    queues = [
        build_queue(group, [0.0] * group.units, allowed=allowed[group.name], round_to=job.round_to)
        for group in groups
        if group.name in allowed
    ]
    wanted = demand(job, cost, cost, groups, scope, job.steps)
    taken = {}
    if not job.allocation.measures:
        taken = job.allocation.allocate(AllocationTask(queues, wanted, Meter(cost, queues)))
    if not job.allocation.measures and not any(taken.values()):
        raise SelectionError(
            "the amount asked for is less than one step of removal"
            + (
                f" under --round-to {job.round_to}; ask for more or round less"
                if job.round_to > 1
                else "; ask for more"
            )
        )


def _scored(job: PruneJob, group: CoupledGroup) -> list[Span]:
    roles = job.criterion.roles
    return [span for span in group.spans if roles is None or span.role in roles] or list(group.spans)


def _check_calibration(job: PruneJob, structure: Structure, *, tokenizer: bool) -> None:
    if job.calibration is None:
        return
    limit = getattr(structure.config.get_text_config(), "max_position_embeddings", None)
    length = length_for(job.calibration, structure)
    if limit and length > limit:
        raise DataError(f"calibration length {length} is beyond the model's {limit} positions; lower --length")
    for part in job.calibration.text.parts:
        if not part.source.writes and not tokenizer:
            raise ModelError(
                f"'{structure.ref}' brings no tokenizer, so it cannot be calibrated on '{part.reference}'; use 'self'"
            )
    job.calibration.text.check()


def _cost(job: PruneJob, structure: Structure) -> Cost | None:
    """The cost, where shapes alone tell it."""
    if not job.budget.from_shapes or structure.plans:
        return None
    groups = scope_of(job, structure).groups(structure.graph)
    return job.budget.cost(BudgetSubject(meta_model(structure.config), structure.graph, groups, structure.family), None)
