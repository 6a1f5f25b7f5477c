"""From settings to jobs: creating components, filling in the defaults of methods, refusing options without effect.

Stages read jobs alone, not settings, so an option that does not change the job has no effect. Jobs do not depend on the
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final, Literal

from ..calibration.calibration import CalibrationText, parse_calibration
from ..engine.signals import Signal
from ..errors import PluginError, SettingsError
from ..evaluation.base import Metric
from ..evaluation.runtime import Runtime
from ..exporters import Exporter
from ..plugins.catalog import Catalog
from ..pruning.allocation.base import Allocation
from ..pruning.budgets.base import Budget
from ..pruning.compensation.base import Compensation
from ..pruning.criteria.base import ImportanceCriterion
from ..pruning.methods.base import Method
from ..pruning.methods.presets import ByHand
from ..recovery.base import RecoveryStrategy
from ..report.base import ReportSection
from ..settings import (
    BenchSettings,
    EvaluateSettings,
    ExportSettings,
    Meet,
    PageSettings,
    PruneSettings,
    RecoverSettings,
    SensitivitySettings,
    Shape,
    settings_from,
)
from ..structure.coupling import HIDDEN, LAYER
from ..structure.widths import COUNTED
from .given import Given

HOW_MUCH = "say how much to remove with one of --ratio, --target-params or --unit-ratio"
_AMOUNTS: Final[Mapping[str, Literal["ratio", "parameters", "units"]]] = {
    "ratio": "ratio",
    "target_params": "parameters",
    "unit_ratio": "units",
}


@dataclass(frozen=True)
class CalibrationJob:
    """The calibration text to read. ``fixed_length``: whether the user gave the length; a default is limited to the
    model's positions."""

    text: CalibrationText
    samples: int
    length: int
    fixed_length: bool


@dataclass(frozen=True)
class PruneJob:
    """All that a plan and a cut depend on, besides the model.

    ``by``, ``amount``: a share (``ratio``) of ``budget``, total ``parameters`` to remain, or a share of ``units``.
    ``shape``, ``round_to``: see `structure.widths`; ``meet``: see `Demand`. ``calibration``: None when no component
    reads text.
    """

    by: Literal["ratio", "parameters", "units"]
    amount: float
    budget: Budget
    kinds: tuple[str, ...]
    layers: str | None
    shape: Shape
    round_to: int | None
    criterion: ImportanceCriterion
    reduction: str
    allocation: Allocation
    normalization: str
    steps: int
    compensation: Compensation
    calibration: CalibrationJob | None
    seed: int
    meet: Meet = "nearest"
    fixed_reduction: bool = False
    """Whether the user gave the reduction."""

    @property
    def scores_read_text(self) -> bool:
        """Whether scores or the allocation depend on calibration text."""
        return bool(self.criterion.signals - {Signal.WEIGHT}) or self.allocation.measures


@dataclass(frozen=True)
class RecoverJob:
    """A strategy with its settings, and the settings that all strategies share. ``instead``: where the user names no
    strategy, the one for models with which ``strategy`` cannot be used, see `default_strategy.with_strategy`."""

    strategy: RecoveryStrategy
    settings: RecoverSettings
    instead: RecoveryStrategy | None = None


@dataclass(frozen=True)
class EvaluateJob:
    """The metrics to measure, in the order of their columns."""

    metrics: tuple[Metric, ...]


@dataclass(frozen=True)
class BenchJob:
    """A runtime, and the sizes to measure: every batch size with every length of prompt. ``new``: tokens to decode."""

    runtime: Runtime
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    new: int
    rounds: int


def method_of(settings: PruneSettings, catalog: Catalog) -> Method:
    """The method that the user gave; else `ByHand` if the user gave a criterion, else ``best``."""
    if settings.method is not None:
        return catalog.methods[settings.method]()
    return ByHand() if settings.importance is not None else catalog.methods["best"]()


def prune_job(settings: PruneSettings, catalog: Catalog) -> PruneJob:
    """Raises `SettingsError` (or `UnknownNameError`) for settings that are wrong or have no effect together."""
    amounts = [name for name in _AMOUNTS if getattr(settings, name) is not None]
    if len(amounts) != 1:
        raise SettingsError(HOW_MUCH if not amounts else f"{HOW_MUCH}, not with {len(amounts)} of them")
    (amount,) = amounts
    text = parse_calibration(settings.calibration, catalog.sources, settings.settings)
    method = method_of(settings, catalog)
    defaults = _defaults(method, settings, writes=text.writes)
    given = Given(settings, defaults.pop("settings", {}))
    settings = _filled(method, settings, {name: value for name, value in defaults.items() if not given.has(name)})
    assert settings.importance and settings.compensate and settings.samples and settings.length, "given or filled in"
    text = parse_calibration(settings.calibration, catalog.sources, settings.settings)
    _refuse_without_effect(given, settings, amount)
    budget_name = {"ratio": settings.budget, "target_params": "parameters", "unit_ratio": "decoder"}[amount]
    budget = given.create("budget", catalog.budgets, budget_name)
    criterion = given.create("importance", catalog.criteria, settings.importance)
    allocation = given.create("allocation", catalog.allocations, settings.allocation)
    compensation = given.create("compensate", catalog.compensations, settings.compensate)
    given.configured("method", type(method))
    if not allocation.compares_groups:
        given.refuse("normalize", f"with --allocation {allocation.name}, which compares no scores of different groups")
    if allocation.one_step and settings.steps > 1:
        raise SettingsError(
            f"--allocation {allocation.name} holds for the model before the first cut alone; leave --steps out"
        )
    if criterion.signals & {Signal.STREAM, Signal.STREAM_BLOCKS}:
        given.refuse("reduction", f"with {criterion.label()}, which gives each layer one score")
    if settings.steps > 1 and amount == "unit_ratio":
        raise SettingsError("--unit-ratio goes in one step; use --ratio for iterative pruning")
    calibration = None
    if bool(criterion.signals - {Signal.WEIGHT}) or allocation.measures or compensation.reads_text:
        for part in text.parts:
            given.use(part.source)
        calibration = CalibrationJob(text, settings.samples, settings.length, given.has("length"))
        _check_samples(calibration, allocation, compensation)
    else:
        for name in ("calibration", "samples", "length"):
            given.refuse(name, f"with {criterion.label()} and --compensate {compensation.name}, which read no text")
    given.check_all_used()
    return PruneJob(
        by=_AMOUNTS[amount],
        amount=float(getattr(settings, amount)),
        budget=budget,
        kinds=settings.kinds,
        layers=settings.layers,
        shape=settings.shape,
        round_to=settings.round_to,
        criterion=criterion,
        reduction=settings.reduction,
        allocation=allocation,
        normalization=settings.normalize,
        steps=settings.steps,
        compensation=compensation,
        calibration=calibration,
        seed=settings.seed,
        meet=settings.meet,
        fixed_reduction=given.has("reduction"),
    )


def _check_samples(calibration: CalibrationJob, allocation: Allocation, compensation: Compensation) -> None:
    """Raise `SettingsError` (or `DataError`) for samples that the sources of the text, or those who use it, cannot
    share."""
    text, samples = calibration.text, calibration.samples
    if len(text.parts) > samples:
        raise SettingsError(f"--samples {samples} cannot be shared by {len(text.parts)} sources; raise --samples")
    if compensation.holds_out_sources and len(text.parts) == 1:
        raise SettingsError(
            f"{compensation.label()}: held_out = sources has no effect with one source of calibration text; "
            "name several, or leave it out"
        )
    if allocation.measures and compensation.ranks_again and samples == 1:
        raise SettingsError(
            "cuts are measured on one sample or more, and weights fitted on the others, of which --samples 1 "
            "leaves none; give 2 or more, or --compensate none"
        )
    text.order(samples)


def _refuse_without_effect(given: Given, settings: PruneSettings, amount: str) -> None:
    """Refuse options that have no effect with this ``amount`` or these kinds of units."""
    if amount == "unit_ratio":
        given.refuse("meet", "with --unit-ratio, which is rounded to whole units in every group")
    if amount != "ratio":
        given.refuse("budget", f"with {given.flag(amount)}: it is what --ratio is a share of")
        given.unused_shorthands("budget", f"with {given.flag(amount)}")
    if set(settings.kinds) <= COUNTED:
        given.refuse("round_to", f"with --kinds {','.join(settings.kinds)}, which are counted and not rounded")
    if set(settings.kinds) == {LAYER}:
        given.refuse("shape", "with --kinds layer: the layers that stay keep their widths")
    if set(settings.kinds) == {HIDDEN}:
        given.refuse("layers", "with --kinds hidden, whose channels run through all layers")


def _defaults(method: Method, settings: PruneSettings, *, writes: bool) -> dict[str, Any]:
    """What ``method`` gives, and what `ByHand` does for what it leaves open."""
    found = method.defaults(settings, writes=writes)
    if not isinstance(found, Mapping):
        raise PluginError(f"method {method.name} gave {type(found).__name__}; expected a mapping of settings")
    defaults = {**ByHand().defaults(settings, writes=writes), **found}
    unknown = sorted(defaults.keys() - PruneSettings.model_fields.keys())
    if unknown:
        raise SettingsError(f"method {method.name} gives '{unknown[0]}', which is no setting of a prune")
    if settings.importance is None and defaults.get("importance") is None:
        raise SettingsError(f"method {method.name} gives no criterion; choose one with --importance")
    return defaults


def _filled(method: Method, settings: PruneSettings, defaults: Mapping[str, Any]) -> PruneSettings:
    """``settings`` with ``defaults`` for what they leave open. Raises `SettingsError` for a value that is refused."""
    try:
        checked = settings_from(PruneSettings, defaults)
    except SettingsError as error:
        raise SettingsError(f"method {method.name}: {error}") from error
    return settings.model_copy(update={name: getattr(checked, name) for name in defaults})


_WHOLE_MODEL = (
    "minutes", "gradient_checkpointing", "validation", "validation_data", "eval_steps", "patience", "report_to"
)  # fmt: skip
"""Settings of a training of the whole model."""


def sensitivity_job(settings: SensitivitySettings, catalog: Catalog) -> PruneJob:
    """A prune of the largest share, from which the measurement takes how units are ranked, on which text, and whether
    weights are fitted. Raises `SettingsError` (or `UnknownNameError`)."""
    if list(settings.shares) != sorted(set(settings.shares)):
        raise SettingsError("--shares must ascend, each once: 0.1,0.25,0.5")
    given = settings.model_dump(exclude_unset=True, exclude={"shares"})
    kinds = set(settings.kinds)
    if kinds == {LAYER}:
        raise SettingsError("--kinds layer alone is one group, whose order --importance decides; add another kind")
    shape = {"shape": "free"}
    # For channels of the residual stream, which run through all layers, it would be refused.
    layers = {} if kinds == {HIDDEN} else {"layers": "all"}
    whole = {"unit_ratio": settings.shares[-1], "allocation": "sensitivity", **shape, **layers, **given}
    return prune_job(settings_from(PruneSettings, whole), catalog)


def recover_job(settings: RecoverSettings, catalog: Catalog) -> RecoverJob:
    """Raises `SettingsError` (or `UnknownNameError`) for settings that are wrong or have no effect together."""
    given, instead = Given(settings), None
    name = settings.strategy
    if name is None:
        adapters = "lora" in settings.settings or any(map(given.has, ("rank", "alpha", "dropout", "merge")))
        name = "lora" if adapters else "distil"
        # Settings for distillation ask for it.
        instead = None if name in settings.settings or adapters else catalog.strategies["lora"]()
    strategy = given.create("strategy", catalog.strategies, name)
    for name in ("max_steps", "minutes"):
        if given.has(name):
            given.refuse("epochs", f"with {given.flag(name)}, which sets the number of steps")
    _check_validation(given, settings)
    _check_trackers(settings)
    if settings.micro_batch_size > settings.batch_size:
        given.refuse("micro_batch_size", f"beyond the {settings.batch_size} examples of --batch-size")
    if strategy.by_layer:
        for name in _WHOLE_MODEL:
            given.refuse(name, f"with {strategy.label()}, which trains one layer after the other")
        settings = settings.model_copy(update={"validation": 0})
    if not strategy.adapters:
        given.refuse("merge", f"with {strategy.label()}, which trains no adapters")
    given.check_all_used()
    return RecoverJob(strategy, settings, instead)


def _check_validation(given: Given, settings: RecoverSettings) -> None:
    if settings.validation_data is not None:
        given.refuse("validation", "with --validation-data, which is all that is validated on")
    elif settings.validation == 0:
        for name in ("eval_steps", "patience"):
            given.refuse(name, "with --validation 0, which turns validation off")


def _check_trackers(settings: RecoverSettings) -> None:
    """Raise `SettingsError` for a program of ``--report-to`` that is not installed."""
    for name in settings.report_to or ():
        if find_spec(name) is None:
            raise SettingsError(f"--report-to {name}: {name} is not installed; run: pip install {name}")


def evaluate_job(settings: EvaluateSettings, catalog: Catalog) -> EvaluateJob:
    """The metrics to measure: always the size, and perplexity on Python's help topics when nothing is named. Raises
    `SettingsError` (or `UnknownNameError`) for settings that are wrong."""
    chosen: dict[str, dict[str, Any]] = {"size": {}}
    if settings.perplexity is not None or settings.window is not None or settings.kl:
        chosen["perplexity"] = {} if settings.perplexity is None else {"text": settings.perplexity}
    if settings.tasks is not None:
        chosen["tasks"] = {"names": settings.tasks}
    elif settings.limit is not None:
        raise SettingsError("--limit is of --tasks; name tasks")
    if settings.speed:
        chosen["speed"] = {}
    for name in settings.metrics or ():
        chosen.setdefault(name, {})
    if len(chosen) == 1 and not settings.metrics:
        chosen["perplexity"] = {}
    given = Given(settings, chosen)
    metrics = tuple(given.create(name, catalog.metrics, name) for name in chosen)
    given.check_all_used()
    return EvaluateJob(metrics)


def bench_job(settings: BenchSettings, catalog: Catalog) -> BenchJob:
    """Raises `SettingsError` (or `UnknownNameError`) for settings that are wrong or have no effect."""
    given = Given(settings)
    runtime = given.create("runtime", catalog.runtimes, settings.runtime)
    given.check_all_used()
    return BenchJob(runtime, settings.batch, settings.prompt, settings.new, settings.rounds)


def page_job(settings: PageSettings, catalog: Catalog) -> tuple[ReportSection, ...]:
    """The sections of a page. Raises `SettingsError` for settings that are wrong or of no section."""
    given = Given(settings)
    sections = tuple(given.create("sections", catalog.sections, name) for name in catalog.sections)
    given.check_all_used()
    return sections


def export_job(settings: ExportSettings, catalog: Catalog) -> Exporter:
    """Raises `SettingsError` (or `UnknownNameError`) for settings that are wrong or have no effect."""
    given = Given(settings)
    exporter = given.create("to", catalog.exporters, settings.to)
    given.check_all_used()
    return exporter
