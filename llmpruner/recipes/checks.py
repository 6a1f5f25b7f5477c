"""Checks of a job against the structure of a model, before weights are read or text is generated."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..calibration.calibration import check_length, parse_calibration
from ..calibration.conversations import example
from ..calibration.documents import EXPECTED_EXAMPLES, check_source
from ..calibration.mixture import parse_mixture
from ..errors import MissingExtraError, SelectionError, SettingsError, UnsupportedModelError, no_tokenizer
from ..pruning.allocation.alike import allocate_alike
from ..pruning.allocation.base import AllocationTask, Meter
from ..pruning.allocation.uniform import Uniform
from ..pruning.budgets.base import BudgetSubject
from ..pruning.budgets.costs import saving_units
from ..pruning.criteria.estimate import check_accepted
from ..recovery.dense_text import dense_text_in
from ..structure.queues import build_queue
from .calibrating import length_for
from .cutting import without_weights
from .jobs import EvaluateJob, PruneJob, RecoverJob
from .wanted import demand, scope_of, widths_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..models.model import Structure
    from ..plugins.catalog import Catalog
    from ..pruning.budgets.costs import Cost
    from ..structure.coupling import CoupledGroup, Span
    from ..structure.plan import PruningPlan
    from ..structure.widths import Widths


def check_prune(job: PruneJob, structure: Structure, *, tokenizer: bool) -> None:
    """Raise for a quantised model, for kinds and layers that the model does not have, for text that cannot be read, and
    for an amount or a rounding that its groups cannot give. ``tokenizer``: whether the model has one."""
    check_unquantised(structure)
    scope = scope_of(job, structure)
    groups = scope.groups(structure.graph)
    check_accepted(job.criterion, groups, structure.graph)
    if job.fixed_reduction and all(len(_scored(job, group)) == 1 for group in groups if not group.modules):
        raise SettingsError(
            f"--reduction has no effect: {job.criterion.label()} scores one span of every group; leave it out"
        )
    widths = widths_of(job, structure)
    if len(widths.alike(groups)) == 1 and not isinstance(job.allocation, Uniform):
        # A group of its own (hidden channels, layers, units of one layer) leaves nothing to divide with free widths.
        why = (
            f"nothing but '{groups[0].name}' may be cut; leave it out"
            if len(groups) == 1
            else "with --shape uniform, all layers keep the same width, and only one kind may be cut; leave it out, or "
            "give --shape free"
        )
        raise SettingsError(f"--allocation {job.allocation.name} has no effect: {why}")
    job.allocation.check(groups)
    job.compensation.check(structure.graph, groups)
    _check_calibration(job, structure, tokenizer=tokenizer)
    job.budget.check(structure.config)
    job.budget.check_kinds(tuple(dict.fromkeys(group.kind for group in groups)))
    if not job.budget.from_shapes:
        return
    cost = _cost(job, structure, groups)
    allowed = {group.name: scope.allowed_units(group) for group in groups}
    if job.by != "units":
        allowed = saving_units(cost, groups, allowed, widths.alike(groups))
    queues = [
        build_queue(group, [0.0] * group.units, allowed=allowed[group.name], multiple=widths.multiple(group))
        for group in groups
        if group.name in allowed
    ]
    wanted = demand(job, cost, cost, groups, scope, job.steps)
    # The largest amount does not depend on scores, so equal shares replace allocations that measure.
    allocation = Uniform() if job.allocation.measures else job.allocation
    task = AllocationTask(queues, wanted, Meter(cost, queues))
    if not any(allocate_alike(allocation, task, widths.alike(groups)).values()):
        raise SelectionError(f"the amount asked for is less than one unit of the selected groups{_coarse(widths)}")


def _coarse(widths: Widths) -> str:
    """How widths limit what can be asked for, and what to do."""
    if widths.uniform:
        return f" in all layers at once, at widths in multiples of {widths.round_to}; ask for more, or for --shape free"
    if widths.round_to > 1:
        return f" under --round-to {widths.round_to}; ask for more, or round less"
    return "; ask for more"


def check_unquantised(structure: Structure) -> None:
    """Raise `UnsupportedModelError` for a checkpoint whose weights are packed (bitsandbytes, GPTQ, AWQ, …): they have
    neither the shapes of the architecture nor values that can be cut and fitted."""
    stated: Any = getattr(structure.config, "quantization_config", None)
    method = stated.get("quant_method") if isinstance(stated, Mapping) else getattr(stated, "quant_method", None)
    name = str(getattr(method, "value", method))
    # transformers itself turns MXFP4 into bfloat16 where there is no kernel for it.
    if stated is not None and name != "mxfp4":
        raise UnsupportedModelError(
            f"'{structure.ref}' is quantised ({name}), and its packed weights cannot be cut; prune the unquantised "
            "model that it was made from, then quantise the result"
        )


def check_replay(plan: PruningPlan, structure: Structure, catalog: Catalog) -> None:
    """Raise for a plan that was made for another model, or that needs a component or calibration text that does not
    exist; and for a quantised model."""
    check_unquantised(structure)
    plan.check(structure.graph)
    catalog.create(catalog.budgets, plan.target.counted_in, plan.target.settings)
    if plan.compensation is None:
        return
    compensation = catalog.create(catalog.compensations, plan.compensation.name, plan.compensation.settings)
    compensation.check(structure.graph, [structure.graph.by_name[name] for name in plan.kept])
    if plan.compensation.calibration is not None:
        how = plan.compensation
        parse_calibration(plan.compensation.calibration, catalog.sources, how.source_settings).check()


def check_text(job: PruneJob) -> None:
    """Raise `DataError` for calibration text that is missing or malformed."""
    if job.calibration is not None:
        job.calibration.text.check()


def check_recover(job: RecoverJob) -> None:
    """Raise `DataError` for training data that is missing or malformed, and as `check_adapters`."""
    check_adapters(job)
    own = dense_text_in(job.settings.data)
    for source, expected in (
        (job.settings.data, f"{EXPECTED_EXAMPLES}, or self, self:N or self-text"),
        (job.settings.validation_data, EXPECTED_EXAMPLES),
    ):
        for part in parse_mixture(source) if source is not None else ():
            if own is None or part.source != own.source:
                check_source(part.source, example, expected)


def check_adapters(job: RecoverJob) -> None:
    """Raise `MissingExtraError` where the library of adapters is needed and not installed."""
    if job.strategy.adapters and find_spec("peft") is None:
        raise MissingExtraError("peft", "recover")


def check_metrics(job: EvaluateJob) -> None:
    """Read the texts and tasks of all metrics. Raises `DataError` for those that are missing or malformed."""
    for metric in job.metrics:
        metric.prepare()


def _scored(job: PruneJob, group: CoupledGroup) -> list[Span]:
    roles = job.criterion.roles
    return [span for span in group.spans if roles is None or span.role in roles] or list(group.spans)


def _check_calibration(job: PruneJob, structure: Structure, *, tokenizer: bool) -> None:
    if job.calibration is None:
        return
    check_length(structure.config, length_for(job.calibration, structure))
    for part in job.calibration.text.parts:
        if not part.source.writes and not tokenizer:
            raise no_tokenizer(f"model '{structure.ref}'", f"it cannot be calibrated on '{part.reference}'; use 'self'")
    check_text(job)
    job.calibration.text.check_amount(job.calibration.samples)


def _cost(job: PruneJob, structure: Structure, groups: Sequence[CoupledGroup]) -> Cost:
    """The cost of the current model, from its shapes."""
    subject = BudgetSubject(without_weights(structure), structure.graph, groups, structure.family)
    return job.budget.cost(subject, None)
