"""Check a job against a model's structure, before weights are read or text is generated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..calibration.calibration import check_length
from ..discovery.groups import build_graph
from ..errors import SelectionError, UnsupportedModelError, no_tokenizer
from ..models.meta import meta_model
from ..models.surgery import cut
from ..structure.scope import build_queue
from .allocation import AllocationTask, Meter, Uniform
from .budgets.base import BudgetSubject, saving_units
from .criteria.estimate import check_accepted
from .job import CalibrationJob, PruneJob, ReplayJob
from .selection import allocate_alike
from .targets import demand, scope_of, widths_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..models.model import Structure
    from ..structure.widths import Widths


def check_job(job: PruneJob | ReplayJob, structure: Structure, *, tokenizer: bool) -> None:
    """Raise for a quantised model, for kinds and layers that the model does not have, for text that cannot be read, for
    an amount that its groups cannot give, and for a plan of another model. ``tokenizer``: whether the model has one."""
    check_unquantised(structure)
    graph = structure.graph
    if isinstance(job, ReplayJob):
        job.plan.check(graph)
        groups = [graph.by_name[name] for name in job.plan.kept]
    else:
        groups = list(scope_of(job, structure).groups(graph))
        check_accepted(job.criterion, groups, graph)
    job.compensation.check(graph, groups)
    if job.calibration is not None:
        _check_calibration(job.calibration, structure, tokenizer=tokenizer)
    if isinstance(job, PruneJob) and job.budget.from_shapes:
        _check_amount(job, structure)


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


def without_weights(structure: Structure, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of ``structure`` after its cuts, with parameters on the meta device."""
    network = meta_model(structure.config, dtype)
    if structure.plans:
        graph = build_graph(structure.family, structure.config)
        for plan in structure.plans:
            graph = cut(network, graph, plan.kept, structure.family)
    return network


def _check_calibration(calibration: CalibrationJob, structure: Structure, *, tokenizer: bool) -> None:
    check_length(structure.config, calibration.length_for(structure.config))
    for part in calibration.text.parts:
        if not part.source.writes and not tokenizer:
            raise no_tokenizer(f"model '{structure.ref}'", f"it cannot be calibrated on '{part.reference}'; use 'self'")
    calibration.text.check()


def _check_amount(job: PruneJob, structure: Structure) -> None:
    """Raise `SelectionError` for an amount that is less than a unit, or more than there is."""
    graph, scope, widths = structure.graph, scope_of(job, structure), widths_of(job, structure)
    groups = scope.groups(graph)
    cost = job.budget.cost(BudgetSubject(without_weights(structure), graph, groups, structure.family))
    allowed = {group.name: scope.allowed_units(group) for group in groups}
    if job.by != "units":
        allowed = saving_units(cost, groups, allowed, widths.alike(groups))
    queues = [
        build_queue(group, [0.0] * group.units, allowed=allowed[group.name], multiple=widths.multiple(group))
        for group in groups
        if group.name in allowed
    ]
    amount = demand(job, cost, cost, groups, scope, job.steps)
    # The largest amount does not depend on scores, so equal shares replace allocations that measure.
    allocation = Uniform() if job.allocation.measures else job.allocation
    task = AllocationTask(queues, amount, Meter(cost, queues))
    if not any(allocate_alike(allocation, task, widths.alike(groups)).values()):
        raise SelectionError(f"the amount asked for is less than one unit of the selected groups{_coarse(widths)}")


def _coarse(widths: Widths) -> str:
    """How widths limit what can be asked for, and what to do."""
    if widths.uniform:
        return f" in all layers at once, at widths in multiples of {widths.round_to}; ask for more, or for --shape free"
    if widths.round_to > 1:
        return f" at widths in multiples of {widths.round_to}; ask for more, or round less (--set prune.round_to=1)"
    return "; ask for more"
