"""Turn settings into a job: components are created, and the method fills in what is open. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..calibration.base import CalibrationSource
from ..calibration.calibration import CalibrationJob, parse_calibration
from ..catalog import Catalog
from ..component import Component, check_chosen
from ..engine.signals import Signal
from ..errors import MEANT, DataError, SettingsError, UnknownNameError
from ..settings import PruneSettings, Shape, settings_from
from ..structure.coupling import KINDS, VOCABULARY
from ..structure.plan import By, CompensationRecord, PruningPlan
from .allocation import Allocation
from .budgets import Budget
from .compensation.base import Compensation
from .criteria.base import ImportanceCriterion
from .methods import TEN_SAMPLES, Method

if TYPE_CHECKING:
    from ..engine.walk import CalibrationSet

C = TypeVar("C", bound=Component)


@dataclass(frozen=True)
class PruneJob:
    """All that a plan and a cut depend on, besides the model."""

    by: By
    """The meaning of ``amount``, as in `Target`."""
    amount: float
    budget: Budget
    kinds: tuple[str, ...]
    layers: str | None
    shape: Shape
    round_to: int | None
    criterion: ImportanceCriterion
    token_criterion: ImportanceCriterion | None
    """Scores tokens, where ``kinds`` has others too that ``criterion`` scores."""
    reduction: str
    allocation: Allocation
    steps: int
    compensation: Compensation
    calibration: CalibrationJob | None
    """None when no component reads text."""
    seed: int
    settings: PruneSettings
    """What the job was made of."""

    @property
    def given(self) -> dict[str, Any]:
        return self.settings.given()


@dataclass(frozen=True)
class ReplayJob:
    """A plan that is applied again, with the components and the text that its compensation needs."""

    plan: PruningPlan
    budget: Budget
    compensation: Compensation
    calibration: CalibrationJob | None
    seed: int
    given: Mapping[str, Any]
    """What the user set, as JSON values: the file of the plan, if there is one."""

    def check_text(self, text: CalibrationSet | None) -> None:
        """Raise `DataError` for another text than the plan's; one that the model writes may differ elsewhere."""
        record, job = self.plan.compensation, self.calibration
        if text is None or record is None or job is None or job.writes:
            return
        if text.fingerprint != record.fingerprint:
            raise DataError(f"'{text.source}' is not the text that this plan was made with; make a new plan")


Job = PruneJob | ReplayJob


def replay_job(plan: PruningPlan | str | Path, catalog: Catalog) -> ReplayJob:
    """The job of a plan, or of one in a file. Raises `PlanError` for a file without a plan, `UnknownNameError` and
    `SettingsError` for components of the plan that are not here."""
    given: dict[str, Any] = {}
    if not isinstance(plan, PruningPlan):
        plan, given = PruningPlan.load(plan), {"plan": str(plan)}
    budget = catalog[Budget].create(plan.target.counted_in, plan.target.settings)
    record = plan.compensation or CompensationRecord(name="none")
    compensation = catalog[Compensation].create(record.name, record.settings)
    calibration = None
    if record.calibration is not None and record.samples and record.length:
        parts = parse_calibration(record.calibration, catalog[CalibrationSource], record.sources)
        calibration = CalibrationJob(record.calibration, parts, record.samples, record.length)
    return ReplayJob(plan, budget, compensation, calibration, plan.seed, given)


def prune_job(settings: PruneSettings, catalog: Catalog) -> PruneJob:
    """Raises `SettingsError` (or `UnknownNameError`) for settings that are wrong or contradict each other."""
    for kind in settings.kinds:
        if kind.lower() in MEANT:  # families may have other kinds than those known
            raise UnknownNameError("kind", kind, KINDS)
    by, amount = _amount(settings)
    given, user_values, method = settings, settings.settings, None
    if settings.method is not None or settings.importance is None:
        name = settings.method or "best"
        method = catalog[Method].create(name, user_values.get(name))
    parts = parse_calibration(settings.calibration, catalog[CalibrationSource], user_values)
    explicit = {name for name in settings.model_fields_set if getattr(settings, name) is not None}
    settings, defaults = _filled(settings, explicit, method, writes=any(part.source.writes for part in parts))
    parts = parse_calibration(settings.calibration, catalog[CalibrationSource], user_values)  # a method may name it
    assert settings.importance and settings.compensate and settings.samples and settings.length, "filled in"

    def create(base: type[C], name: str) -> C:
        return catalog[base].create(name, {**defaults.get(name, {}), **user_values.get(name, {})})

    budget = create(Budget, {"ratio": settings.budget, "units": "decoder"}.get(by, "parameters"))
    criterion, token_criterion = create(ImportanceCriterion, settings.importance), None
    mixed = VOCABULARY in settings.kinds and len(settings.kinds) > 1
    if mixed and not criterion.accepts(VOCABULARY):
        token_criterion = create(ImportanceCriterion, VOCABULARY)
    # Equal shares of tokens and of channels would compare what has no common measure.
    by_sensitivity = mixed and "allocation" not in explicit
    allocation = create(Allocation, "sensitivity" if by_sensitivity else settings.allocation)
    compensation = create(Compensation, settings.compensate)
    if settings.steps > 1 and by == "units":
        raise SettingsError("prune.unit_ratio goes in one step; use --ratio with --steps")
    if settings.steps > 1 and VOCABULARY in settings.kinds:
        raise SettingsError("tokens go in one step; leave --steps out")
    components = budget, criterion, token_criterion, allocation, compensation, method, *(p.source for p in parts)
    check_chosen(user_values, filter(None, components))
    calibration = None
    scored_on_text = any(each is not None and each.needs - {Signal.WEIGHT} for each in (criterion, token_criterion))
    if scored_on_text or allocation.measures or compensation.reads_text:
        calibration = CalibrationJob(
            settings.calibration, parts, settings.samples, settings.length, fixed_length="length" in explicit,
            fixed_samples="samples" in explicit or not compensation.reads_text,
        )  # fmt: skip
        calibration.order()  # refuses samples that are fewer than the sources
    return PruneJob(
        by=by, amount=float(amount), budget=budget, kinds=settings.kinds, layers=settings.layers, shape=settings.shape,
        round_to=settings.round_to, criterion=criterion, token_criterion=token_criterion, reduction=settings.reduction,
        allocation=allocation, steps=settings.steps, compensation=compensation, calibration=calibration,
        seed=settings.seed, settings=given,
    )  # fmt: skip


def check_data(job: Job) -> None:
    """Raise `DataError` for text that cannot be read."""
    if job.calibration is not None:
        job.calibration.check()


def why_in_memory(job: Job, saves: bool) -> str | None:
    """What needs the whole model in memory; None if nothing does. ``saves``: the model is cut."""
    if isinstance(job, PruneJob) and job.steps > 1:
        return "--steps cuts copies of the model"
    if isinstance(job, PruneJob) and job.allocation.measures:
        return f"{job.allocation.label()} runs copies of the model"
    if not job.budget.from_shapes:
        return f"{job.budget.label()} measures the model"
    if saves and not job.compensation.by_layer:
        return f"{job.compensation.label()} changes weights of the whole model"
    return None


def _amount(settings: PruneSettings) -> tuple[By, Any]:
    """`PruneJob.by`, and its ``amount`` as the user gave it."""
    every: dict[By, Any] = {"ratio": settings.ratio, "parameters": settings.target_params, "units": settings.unit_ratio}
    amounts = [(by, value) for by, value in every.items() if value is not None]
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
    if settings.ratio is None and "budget" in settings.model_fields_set:
        raise SettingsError("--budget says what --ratio is a share of; leave it out, or give --ratio")
    return amounts[0]


def _filled(
    settings: PruneSettings, explicit: Collection[str], method: Method | None, *, writes: bool
) -> tuple[PruneSettings, Mapping[str, Mapping[str, Any]]]:
    """``settings`` with the defaults of ``method`` or `TEN_SAMPLES`; and the method's for settings of components."""
    defaults, name = dict(TEN_SAMPLES), ""
    if method is not None:
        defaults, name = {**defaults, **method.defaults(settings, writes=writes)}, method.name
    of_components: Mapping[str, Mapping[str, Any]] = defaults.pop("settings", {})
    if settings.importance is None and defaults.get("importance") is None:
        raise SettingsError(f"method {name} gives no criterion; choose one with --importance")
    defaults = {field: value for field, value in defaults.items() if field not in explicit}
    try:
        checked = settings_from(PruneSettings, defaults)
    except SettingsError as error:
        raise SettingsError(f"method {name}: {error}") from error
    return settings.model_copy(update={field: getattr(checked, field) for field in defaults}), of_components
