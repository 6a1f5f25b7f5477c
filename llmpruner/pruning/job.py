"""From settings to a job, and what is refused before weights are read or text is generated.

In `job_of`, components are created, and what the user left open is filled in by the method; a job does not depend on
the model, and stages read jobs, not settings. `check_job` holds it against the structure of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
import transformers

from .. import __version__
from ..calibration.calibration import CalibrationText, check_length, parse_calibration
from ..component import check_chosen
from ..engine.signals import Signal
from ..errors import SelectionError, SettingsError, UnsupportedModelError, no_tokenizer
from ..models.identity import data_identity, model_identity
from ..models.positions import positions_of
from ..models.vocabulary import Vocabulary
from ..settings import PruneSettings, Shape, settings_from
from ..structure.coupling import VOCABULARY
from ..structure.plan import PruningPlan
from .allocation import Uniform
from .budgets import BudgetSubject
from .criteria.estimate import check_accepted
from .methods import TEN_SAMPLES
from .saving import without_weights
from .selection import equal_scores, select
from .targets import demand, scope_of, widths_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..discovery.opening import Opener
    from ..models.model import Structure
    from ..plugins.catalog import Catalog
    from .allocation import Allocation
    from .budgets import Budget
    from .compensation.base import Compensation
    from .criteria.base import ImportanceCriterion
    from .methods import Method

_AMOUNTS: Final[Mapping[str, Literal["ratio", "parameters", "units"]]] = {
    "ratio": "ratio",
    "target_params": "parameters",
    "unit_ratio": "units",
}


@dataclass(frozen=True)
class CalibrationJob:
    """The calibration text to read or to let the model write."""

    text: CalibrationText
    samples: int
    length: int
    """Tokens per sample."""
    fixed_length: bool
    """Whether the user asked for this length; a default is limited to the model's positions."""

    def length_for(self, config: PreTrainedConfig) -> int:
        """Tokens per sample for a model with this configuration."""
        return self.length if self.fixed_length else min(self.length, positions_of(config) or self.length)


@dataclass(frozen=True)
class PruneJob:
    """All that a plan and a cut depend on, besides the model."""

    by: Literal["ratio", "parameters", "units", "tokens"]
    """What ``amount`` is: a share of ``budget`` to remove, the total parameters to keep, the share of the units of
    every group to remove, or the number of tokens to keep."""
    amount: float
    budget: Budget
    kinds: tuple[str, ...]
    layers: str | None
    shape: Shape
    round_to: int | None
    criterion: ImportanceCriterion
    tokens: ImportanceCriterion | None
    """The criterion for tokens, where they are among other ``kinds``."""
    reduction: str
    allocation: Allocation
    steps: int
    compensation: Compensation
    calibration: CalibrationJob | None
    """None when no component reads text."""
    seed: int


@dataclass(frozen=True)
class ReplayJob:
    """A plan that is applied again, with the components and the text that its compensation needs."""

    plan: PruningPlan
    budget: Budget
    compensation: Compensation
    calibration: CalibrationJob | None
    seed: int


def job_of(what: PruneSettings | PruningPlan, catalog: Catalog) -> PruneJob | ReplayJob:
    """Raises `SettingsError` (or `UnknownNameError`) for settings that are wrong or contradict each other."""
    return prune_job(what, catalog) if isinstance(what, PruneSettings) else _replay_job(what, catalog)


def prune_job(settings: PruneSettings, catalog: Catalog) -> PruneJob:
    """Raises as `job_of`."""
    own = settings.settings
    amounts = [name for name in _AMOUNTS if getattr(settings, name) is not None]
    tokens = own.get(VOCABULARY, {}).get("tokens")
    if tokens is not None and (amounts or settings.kinds != (VOCABULARY,)):
        raise SettingsError("vocabulary.tokens says how much to remove by itself, with --kinds vocabulary and no other")
    if tokens is None and len(amounts) != 1:
        raise SettingsError(
            "say how much to remove with one of --ratio, --set prune.target_params and --set prune.unit_ratio"
            + (f"; {len(amounts)} are given" if amounts else "")
        )
    amount = amounts[0] if amounts else "tokens"
    methods: list[Method] = []
    if settings.method is not None or settings.importance is None:
        name = settings.method or "best"
        methods = [catalog.methods.create(name, own.get(name))]
    text = parse_calibration(settings.calibration, catalog.sources, own)
    explicit = {name for name in settings.model_fields_set if getattr(settings, name) is not None}
    settings, of_components = _filled(settings, explicit, methods, writes=text.writes)
    text = parse_calibration(settings.calibration, catalog.sources, own)  # a method may name it
    assert settings.importance and settings.compensate and settings.samples and settings.length, "filled in"

    def of(name: str) -> dict[str, Any]:
        return {**of_components.get(name, {}), **own.get(name, {})}

    counted = {"ratio": settings.budget, "unit_ratio": "decoder"}.get(amount, "parameters")
    budget = catalog.budgets.create(counted, of(counted))
    criterion = catalog.criteria.create(settings.importance, of(settings.importance))
    of_tokens = None
    if VOCABULARY in settings.kinds and len(settings.kinds) > 1 and not criterion.accepts(VOCABULARY):
        of_tokens = catalog.criteria.create(VOCABULARY, of(VOCABULARY))
    shares = settings.allocation
    if VOCABULARY in settings.kinds and len(settings.kinds) > 1 and "allocation" not in explicit:
        shares = "sensitivity"  # equal shares of tokens and of channels would compare what has no common measure
    allocation = catalog.allocations.create(shares, of(shares))
    compensation = catalog.compensations.create(settings.compensate, of(settings.compensate))
    if settings.steps > 1 and amount == "unit_ratio":
        raise SettingsError("prune.unit_ratio goes in one step; use --ratio with --steps")
    if settings.steps > 1 and VOCABULARY in settings.kinds:
        raise SettingsError("tokens go in one step; leave --steps out")
    criteria = [criterion, *([] if of_tokens is None else [of_tokens])]
    check_chosen(own, [budget, *criteria, allocation, compensation, *methods, *(part.source for part in text.parts)])
    calibration = None
    if any(each.signals - {Signal.WEIGHT} for each in criteria) or allocation.measures or compensation.reads_text:
        text.order(settings.samples)  # refuses samples that are fewer than the sources
        calibration = CalibrationJob(text, settings.samples, settings.length, "length" in explicit)
    return PruneJob(
        by=_AMOUNTS.get(amount, "tokens"),
        amount=float(getattr(settings, amount) if tokens is None else tokens),
        budget=budget,
        kinds=settings.kinds,
        layers=settings.layers,
        shape=settings.shape,
        round_to=settings.round_to,
        criterion=criterion,
        tokens=of_tokens,
        reduction=settings.reduction,
        allocation=allocation,
        steps=settings.steps,
        compensation=compensation,
        calibration=calibration,
        seed=settings.seed,
    )


def _filled(
    settings: PruneSettings, explicit: Collection[str], methods: Collection[Method], *, writes: bool
) -> tuple[PruneSettings, Mapping[str, Mapping[str, Any]]]:
    """``settings`` with the defaults of ``methods``, and of `TEN_SAMPLES` for what they leave open, where they are not
    ``explicit``; and the defaults for settings of components. Raises `SettingsError` for a default that is refused."""
    defaults, name = dict(TEN_SAMPLES), ""
    for method in methods:
        defaults |= method.defaults(settings, writes=writes)
        name = method.name
    of_components: Mapping[str, Mapping[str, Any]] = defaults.pop("settings", {})
    if settings.importance is None and defaults.get("importance") is None:
        raise SettingsError(f"method {name} gives no criterion; choose one with --importance")
    try:
        checked = settings_from(PruneSettings, {n: value for n, value in defaults.items() if n not in explicit})
    except SettingsError as error:
        raise SettingsError(f"method {name}: {error}") from error
    return settings.model_copy(update={n: getattr(checked, n) for n in defaults if n not in explicit}), of_components


def _replay_job(plan: PruningPlan, catalog: Catalog) -> ReplayJob:
    budget = catalog.budgets.create(plan.target.counted_in, plan.target.settings)
    record = plan.compensation
    if record is None:
        return ReplayJob(plan, budget, catalog.compensations.create("none"), None, plan.seed)
    compensation = catalog.compensations.create(record.name, record.settings)
    calibration = None
    if record.calibration is not None and record.samples and record.length:
        text = parse_calibration(record.calibration, catalog.sources, record.sources)
        calibration = CalibrationJob(text, record.samples, record.length, fixed_length=True)
    return ReplayJob(plan, budget, compensation, calibration, plan.seed)


def identity(
    what: PruneSettings | PruningPlan, job: PruneJob | ReplayJob, structure: Structure, opener: Opener
) -> dict[str, Any]:
    """JSON values that tell a run from others: all that its result, and the shapes of its hidden states, depend on."""
    return {
        "model": structure.path or structure.ref,
        "files": model_identity(structure.ref, opener.catalog, structure.config),
        "data": data_identity(job),
        "prune": what.model_dump(mode="json"),
        "load": opener.load.model_dump(mode="json"),
        "versions": [__version__, torch.__version__, transformers.__version__],
    }


def check_tokens(job: PruneJob | ReplayJob, tokenizer: Callable[[], Any]) -> None:
    """Where tokens go, raise `UnsupportedModelError` for a tokenizer that cannot be rewritten, and `PlanError` for a
    plan without tokens that it needs. ``tokenizer``: reads it."""
    cuts = [cut for cut in job.plan.cuts.values() if cut.kind == VOCABULARY] if isinstance(job, ReplayJob) else []
    if cuts or (isinstance(job, PruneJob) and VOCABULARY in job.kinds):
        vocabulary = Vocabulary(tokenizer())
        for cut in cuts:
            vocabulary.check_kept(cut.kept, cut.units)


def check_job(job: PruneJob | ReplayJob, structure: Structure, *, tokenizer: bool) -> None:
    """Raise for a quantised model, for kinds and layers that the model does not have, for text that cannot be read, for
    an amount that its groups cannot give, and for a plan of another model. ``tokenizer``: whether the model has one."""
    _check_unquantised(structure)
    graph = structure.graph
    if isinstance(job, ReplayJob):
        job.plan.check(graph)
        groups = [graph.by_name[name] for name in job.plan.kept]
    else:
        groups = list(scope_of(job, structure).groups(graph))
        others = [group for group in groups if job.tokens is None or group.kind != VOCABULARY]
        check_accepted(job.criterion, others, graph)
    job.compensation.check(graph, groups)
    if job.calibration is not None:
        check_length(structure.config, job.calibration.length_for(structure.config))
        for part in job.calibration.text.parts:
            if not part.source.writes and not tokenizer:
                advice = f"it cannot be calibrated on '{part.reference}'; use 'self'"
                raise no_tokenizer(f"model '{structure.ref}'", advice)
        job.calibration.text.check()
    if isinstance(job, PruneJob) and job.budget.from_shapes:
        _check_amount(job, structure)


def _check_unquantised(structure: Structure) -> None:
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


def _check_amount(job: PruneJob, structure: Structure) -> None:
    """Raise `SelectionError` for an amount that is less than a unit, or more than there is."""
    graph, scope, widths = structure.graph, scope_of(job, structure), widths_of(job, structure)
    groups = scope.groups(graph)
    cost = job.budget.cost(BudgetSubject(without_weights(structure), graph, groups, structure.family))
    # The largest amount does not depend on scores, so equal shares replace allocations that measure.
    allocation = Uniform() if job.allocation.measures else job.allocation
    amount = demand(job, cost, cost, groups, scope, job.steps)
    if select(graph, groups, equal_scores(groups), scope, amount, allocation, cost=cost, widths=widths):
        return
    coarse, multiples = "; ask for more", f"at widths in multiples of {widths.round_to}; ask for more,"
    if widths.uniform:
        coarse = f" in all layers at once, {multiples} or for --shape free"
    elif widths.round_to > 1:
        coarse = f" {multiples} or round less (--set prune.round_to=1)"
    raise SelectionError(f"the amount asked for is less than one unit of the selected groups{coarse}")
