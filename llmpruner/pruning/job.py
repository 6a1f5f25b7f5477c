"""From settings to a job: components are created, and what the user left open is filled in by the method. A job does
not depend on the model (`pruning.checks` holds it against one), and stages read jobs, not settings. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..calibration.calibration import CalibrationJob, CalibrationSet, parse_calibration
from ..component import check_chosen
from ..engine.signals import Signal
from ..errors import MEANT, DataError, SettingsError, UnknownNameError
from ..settings import PruneSettings, Shape, settings_from
from ..structure.coupling import KINDS, VOCABULARY
from ..structure.plan import By, CompensationRecord, PruningPlan
from .methods import TEN_SAMPLES, Method

if TYPE_CHECKING:
    from ..plugins.catalog import Catalog
    from .allocation import Allocation
    from .budgets import Budget
    from .compensation.base import Compensation
    from .criteria.base import ImportanceCriterion


@dataclass(frozen=True)
class PruneJob:
    """All that a plan and a cut depend on, besides the model."""

    by: By
    """What ``amount`` is, as in `Target`."""
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

    def check_text(self, text: CalibrationSet | None) -> None:
        """Raise `DataError` for a text that is not that of the plan; but what a model writes depends on rounding, so
        that it may differ on another machine."""
        record, job = self.plan.compensation, self.calibration
        if text is None or record is None or job is None or job.writes:
            return
        if text.fingerprint != record.fingerprint:
            raise DataError(f"'{text.source}' is not the text that this plan was made with; make a new plan")


Job = PruneJob | ReplayJob


def job_of(what: PruneSettings | PruningPlan, catalog: Catalog) -> Job:
    """The job of settings, as `prune_job`, or of a plan that is replayed."""
    if isinstance(what, PruneSettings):
        return prune_job(what, catalog)
    budget = catalog.budgets.create(what.target.counted_in, what.target.settings)
    record = what.compensation or CompensationRecord(name="none")
    compensation = catalog.compensations.create(record.name, record.settings)
    calibration = None
    if record.calibration is not None and record.samples and record.length:
        parts = parse_calibration(record.calibration, catalog.sources, record.sources)
        calibration = CalibrationJob(record.calibration, parts, record.samples, record.length)
    return ReplayJob(what, budget, compensation, calibration, what.seed)


def prune_job(settings: PruneSettings, catalog: Catalog) -> PruneJob:
    """Raises `SettingsError` (or `UnknownNameError`) for settings that are wrong or contradict each other."""
    own = settings.settings
    for kind in settings.kinds:
        if kind.lower() in MEANT:  # families may have other kinds than those known
            raise UnknownNameError("kind", kind, KINDS)
    by, amount = _amount(settings)
    method = None
    if settings.method is not None or settings.importance is None:
        name = settings.method or "best"
        method = catalog.methods.create(name, own.get(name))
    parts = parse_calibration(settings.calibration, catalog.sources, own)
    explicit = {name for name in settings.model_fields_set if getattr(settings, name) is not None}
    settings, of_components = _filled(settings, explicit, method, writes=any(part.source.writes for part in parts))
    parts = parse_calibration(settings.calibration, catalog.sources, own)  # a method may name it
    assert settings.importance and settings.compensate and settings.samples and settings.length, "filled in"

    def of(name: str) -> dict[str, Any]:
        return {**of_components.get(name, {}), **own.get(name, {})}

    counted = {"ratio": settings.budget, "units": "decoder"}.get(by, "parameters")
    budget = catalog.budgets.create(counted, of(counted))
    criterion = catalog.criteria.create(settings.importance, of(settings.importance))
    mixed, of_tokens = VOCABULARY in settings.kinds and len(settings.kinds) > 1, None
    if mixed and not criterion.accepts(VOCABULARY):
        of_tokens = catalog.criteria.create(VOCABULARY, of(VOCABULARY))
    # Equal shares of tokens and of channels would compare what has no common measure.
    shares = "sensitivity" if mixed and "allocation" not in explicit else settings.allocation
    allocation = catalog.allocations.create(shares, of(shares))
    compensation = catalog.compensations.create(settings.compensate, of(settings.compensate))
    if settings.steps > 1 and by == "units":
        raise SettingsError("prune.unit_ratio goes in one step; use --ratio with --steps")
    if settings.steps > 1 and VOCABULARY in settings.kinds:
        raise SettingsError("tokens go in one step; leave --steps out")
    criteria = [criterion] if of_tokens is None else [criterion, of_tokens]
    methods = [] if method is None else [method]
    check_chosen(own, [budget, *criteria, allocation, compensation, *methods, *(part.source for part in parts)])
    calibration = None
    if any(each.signals - {Signal.WEIGHT} for each in criteria) or allocation.measures or compensation.reads_text:
        fixed = "length" in explicit
        calibration = CalibrationJob(settings.calibration, parts, settings.samples, settings.length, fixed)
        calibration.order()  # refuses samples that are fewer than the sources
    return PruneJob(
        by=by,
        amount=float(amount),
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


def _amount(settings: PruneSettings) -> tuple[By, Any]:
    """`PruneJob.by`, and its ``amount`` as the user gave it."""
    given: dict[By, Any] = {"ratio": settings.ratio, "parameters": settings.target_params, "units": settings.unit_ratio}
    amounts = [(by, value) for by, value in given.items() if value is not None]
    tokens = settings.settings.get(VOCABULARY, {}).get("tokens")
    if tokens is not None and (amounts or settings.kinds != (VOCABULARY,)):
        raise SettingsError("vocabulary.tokens says how much to remove by itself, with --kinds vocabulary and no other")
    if tokens is not None:
        return "tokens", tokens
    if len(amounts) != 1:
        raise SettingsError(
            "say how much to remove with one of --ratio, --set prune.target_params and --set prune.unit_ratio"
            + (f"; {len(amounts)} are given" if amounts else "")
        )
    return amounts[0]


def _filled(
    settings: PruneSettings, explicit: Collection[str], method: Method | None, *, writes: bool
) -> tuple[PruneSettings, Mapping[str, Mapping[str, Any]]]:
    """``settings`` with the defaults of ``method``, and of `TEN_SAMPLES` for what it leaves open, where they are not
    ``explicit``; and the defaults for settings of components. Raises `SettingsError` for a default that is refused."""
    defaults, name = dict(TEN_SAMPLES), ""
    if method is not None:
        defaults, name = {**defaults, **method.defaults(settings, writes=writes)}, method.name
    of_components: Mapping[str, Mapping[str, Any]] = defaults.pop("settings", {})
    if settings.importance is None and defaults.get("importance") is None:
        raise SettingsError(f"method {name} gives no criterion; choose one with --importance")
    try:
        checked = settings_from(PruneSettings, {n: value for n, value in defaults.items() if n not in explicit})
    except SettingsError as error:
        raise SettingsError(f"method {name}: {error}") from error
    return settings.model_copy(update={n: getattr(checked, n) for n in defaults if n not in explicit}), of_components
