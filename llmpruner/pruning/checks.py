"""Compare a job with the structure of a model: what is refused before weights are read or text is generated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from .. import __version__
from ..discovery.opening import Opener
from ..errors import SelectionError, UnsupportedModelError
from ..models.model import Structure
from ..models.numbers import stored_value
from ..models.reference import data_identity, model_identity
from ..models.vocabulary import Vocabulary
from ..structure.coupling import VOCABULARY
from .allocation import Uniform
from .budgets import BudgetSubject
from .criteria.estimate import check_accepted
from .job import Job, PruneJob, ReplayJob
from .saving import without_weights
from .selection import demand, scope_of, select, widths_of


def identity(job: Job, structure: Structure, opener: Opener) -> dict[str, Any]:
    """All that the result of a run depends on, as JSON values, by which an interrupted run is known again."""
    return {
        "model": structure.path or structure.ref,
        "files": model_identity(structure.reference),
        "data": data_identity(job),
        "prune": (job.plan if isinstance(job, ReplayJob) else job.settings).model_dump(mode="json"),
        "load": opener.load.model_dump(mode="json"),
        "versions": [__version__, torch.__version__, transformers.__version__],
    }


def check_job(job: Job, structure: Structure, opener: Opener) -> None:
    """Raise `LlmprunerError` for kinds, layers, an amount or a plan that the model does not allow, for text that cannot
    be read, for packed weights, and where tokens go, for a tokenizer that cannot be rewritten."""
    _check_unquantised(structure)
    graph = structure.graph
    if isinstance(job, ReplayJob):
        job.plan.check(graph)
        groups = [graph.by_name[name] for name in job.plan.kept]
    else:
        groups = list(scope_of(job, structure).groups(graph))
        others = [group for group in groups if job.token_criterion is None or group.kind != VOCABULARY]
        check_accepted(job.criterion, others, graph)
    job.compensation.check(graph, groups)
    if job.calibration is not None:
        job.calibration.length_for(structure.config)  # refuses samples beyond its positions
        for part in job.calibration.parts:
            if not part.source.writes:
                opener.check_tokenizer(structure, f"it cannot be calibrated on '{part.reference}'; use 'self'")
    if isinstance(job, ReplayJob):
        for cut in job.plan.cuts.values():
            if cut.kind == VOCABULARY:
                Vocabulary(opener.tokenizer(structure)).check_kept(cut.kept, cut.units)
        return
    if job.budget.from_shapes:
        _check_amount(job, structure)
    if VOCABULARY in job.kinds:
        Vocabulary(opener.tokenizer(structure))  # refuses one that cannot be rewritten


def _check_unquantised(structure: Structure) -> None:
    """Raise `UnsupportedModelError` for packed weights (bitsandbytes, GPTQ, AWQ, …), which cannot be cut and fitted."""
    stated = stored_value(structure, "quantization_config")
    method = stated.get("quant_method") if isinstance(stated, Mapping) else getattr(stated, "quant_method", None)
    name = str(getattr(method, "value", method))
    # transformers itself turns MXFP4 into bfloat16 where there is no kernel for it.
    if stated is not None and name != "mxfp4":
        raise UnsupportedModelError(
            f"'{structure.ref}' is quantised ({name}), and its packed weights cannot be cut; prune the unquantised "
            "model that it was made from, then quantise the result"
        )


def _check_amount(job: PruneJob, structure: Structure) -> None:
    """Raise `SelectionError` for an amount that is less than a unit, or more than there is."""
    graph, scope, widths = structure.graph, scope_of(job, structure), widths_of(job, structure)
    groups = scope.groups(graph)
    cost = job.budget.cost(BudgetSubject(without_weights(structure), graph, groups, structure.family))
    # The largest amount does not depend on scores, so equal shares replace allocations that measure.
    allocation = Uniform() if job.allocation.measures else job.allocation
    amount = demand(job, cost, cost, groups, scope, job.steps)
    equal = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in groups}
    if select(graph, groups, equal, scope, amount, allocation, cost=cost, widths=widths):
        return
    if scope.kinds == (VOCABULARY,):
        step = widths.multiple(groups[0])
        raise SelectionError(f"the number of tokens that stay is a multiple of {step}; ask for fewer")
    advice, multiple = "; ask for more", max(map(widths.multiple, groups))
    if widths.uniform:
        advice = f" in all layers at once, at widths in multiples of {multiple}; ask for more, or for --shape free"
    elif multiple > 1:
        advice = f" at widths in multiples of {multiple}; ask for more, or round less (--set prune.round_to=1)"
    raise SelectionError(f"the amount asked for is less than one unit of the selected groups{advice}")
