"""The whole story in one readable file: load → discover → estimate → select → cut → save.

Every stage takes a small frozen value and returns the next; this module only strings them together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from .. import __version__
from ..budgets.costs import CutCost
from ..budgets.open import open_budget
from ..checkpoints.save import save_checkpoint
from ..compensation.choose import Chooser, can_wait
from ..compensation.repair import repair
from ..compensation.trials import Trials
from ..data.calibration import SELF, calibration_set, sources_of
from ..engine.signals import Signal
from ..errors import DataError, SelectionError, UnknownNameError
from ..importance.estimate import Scores, estimate
from ..loading.dense import base_record
from ..models.surgery import cut
from ..progress import Progress
from ..selection.base import Demand
from ..selection.normalize import normalize
from ..selection.search import MEASURED
from ..selection.select import select
from ..structure.kept import compose, layer_numbers, renamed, surviving_units
from ..structure.plan import BaseRef, Compensation, Estimation, PruningPlan, Selection, Target, cuts_of, structure_of
from ..structure.scope import Scope

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..budgets.costs import Cost
    from ..compensation.choose import Chooser
    from ..data.calibration import CalibrationSet
    from ..importance.base import ImportanceCriterion
    from ..loading.model import LoadedConfig, LoadedModel
    from ..selection.base import Demand
    from ..structure.coupling import CoupledGroup, CouplingGraph
    from ..structure.kept import Kept
    from ..structure.scope import Scope


COMPENSATIONS = ("refit", "bias", "none")
_FEWER_TOKENS = 16384


@dataclass(frozen=True)
class PruneSettings:
    """What to remove, how to choose it, and how to make good for it. ``layers``: decoder layers whose units may go;
    None protects the family's default at both ends. ``compensate``: one of `COMPENSATIONS`."""

    target: Target
    kinds: tuple[str, ...] = ("mlp",)
    layers: tuple[int, ...] | None = None
    reduction: str = "sum"
    allocation: str = "uniform"
    normalization: str = "none"
    steps: int = 1
    round_to: int = 1
    compensate: str = "none"
    mix: float = 0.5
    calibration: str = "self"
    samples: int = 10
    length: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Draft:
    """A plan that may still be open: with a ``chooser``, how many units of each group go is settled, and which ones is
    not. ``calibration``: what chooser and repair read; None where there is neither, or it is to be read again."""

    plan: PruningPlan
    calibration: CalibrationSet | None = None
    chooser: Chooser | None = None


def make_plan(
    loaded: LoadedModel,
    criterion: ImportanceCriterion,
    settings: PruneSettings,
    progress: Progress | None = None,
    calibration: CalibrationSet | None = None,
) -> PruningPlan:
    """Estimate and select. The loaded model is not changed; with more than one step a copy of it is cut on the way.

    To make a plan only to apply it, `draft_plan` and `apply_draft` give the same and may save a walk through the model.

    ``calibration``: what `calibrate` gave for the same settings, where the caller needs it again.
    """
    draft = draft_plan(loaded, criterion, settings, progress, calibration)
    if draft.chooser is None or draft.calibration is None:
        return draft.plan
    chosen = draft.chooser.choose_all(
        loaded.model, loaded.graph, draft.plan.kept, draft.calibration, progress or Progress()
    )
    return _settled(loaded, draft.plan, chosen)


def draft_plan(
    loaded: LoadedModel,
    criterion: ImportanceCriterion,
    settings: PruneSettings,
    progress: Progress | None = None,
    calibration: CalibrationSet | None = None,
) -> Draft:
    """`make_plan`, which may leave to a repair which units go."""
    progress = progress or Progress()
    scope = Scope(settings.kinds, settings.layers or default_layers(loaded))
    model, graph = loaded.model, loaded.graph
    if settings.compensate not in COMPENSATIONS:
        raise UnknownNameError("compensation", settings.compensate, COMPENSATIONS)
    target, whole = open_budget(settings.target, model, graph, scope, loaded.family, progress)
    calibration = calibration or calibrate(loaded, criterion, settings, progress)
    chooser = _chooser(loaded, criterion, settings, scope.groups(graph))
    scored_on = _scored_on(calibration, criterion, settings, chooser)
    kept: dict[str, tuple[int, ...]] = {}
    for step in range(1, settings.steps + 1):
        groups = scope.groups(graph)
        scores = estimate(
            model, graph, groups, criterion, scored_on,
            reduction=settings.reduction, seed=settings.seed, progress=progress,
        )  # fmt: skip
        cost = CutCost(whole, loaded.graph, kept) if kept else whole
        ranked = normalize(graph, graph.by_name, scores.by_group, settings.normalization, cost)
        demand = _demand(whole, cost, groups, scope, target, step, settings.steps)
        chosen = select(
            graph, groups, Scores(ranked), scope, demand,
            cost=cost, allocation=settings.allocation, round_to=settings.round_to,
            loss=_loss(loaded, model, graph, groups, settings, calibration, progress), progress=progress,
        )  # fmt: skip
        names = renamed(loaded.graph, kept)
        survivors = {name: surviving_units(loaded.graph, kept, loaded.graph.by_name[name]) for name in names}
        kept = compose(kept, chosen, names, survivors)
        if step < settings.steps:
            model = copy.deepcopy(loaded.model)
            graph = cut(model, loaded.graph, kept, loaded.family)
            scope = _rescope(scope, loaded, kept, settings)
    if not kept:
        raise SelectionError("the amount asked for is less than one unit of the selected groups; ask for more")
    plan = PruningPlan(
        base=BaseRef(
            model=loaded.ref,
            revision=getattr(loaded.config, "_commit_hash", None),
            structure=structure_of(loaded.graph),
        ),
        family=loaded.family.name,
        estimation=_estimation(criterion, settings, calibration),
        selection=Selection(
            kinds=settings.kinds,
            layers=settings.layers or default_layers(loaded),
            allocation=settings.allocation,
            normalization=settings.normalization,
            steps=settings.steps,
            round_to=settings.round_to,
        ),
        compensation=_compensation(settings, calibration),
        target=target,
        seed=settings.seed,
        cuts=cuts_of(loaded.graph, kept),
    )
    return Draft(plan, calibration, chooser)


def _settled(loaded: LoadedModel, plan: PruningPlan, kept: Kept) -> PruningPlan:
    return plan.model_copy(update={"cuts": cuts_of(loaded.graph, kept)})


def measured(loaded: LoadedModel, settings: PruneSettings, progress: Progress | None = None) -> PruneSettings:
    """``settings`` with what their budget had to measure. `make_plan` does the same; ask first where long work comes
    before it, so that a budget to which nothing can give is refused at once."""
    scope = Scope(settings.kinds, settings.layers or default_layers(loaded))
    target, _ = open_budget(settings.target, loaded.model, loaded.graph, scope, loaded.family, progress)
    return replace(settings, target=target)


def apply_plan(
    loaded: LoadedModel,
    plan: PruningPlan,
    progress: Progress | None = None,
    calibration: CalibrationSet | None = None,
) -> LoadedModel:
    """Repair what reads cut units, if the plan says so, and cut, in place. ``calibration``: as for `make_plan`; read
    or written again where it is not at hand.

    Raises `PlanError` when the plan was made for another model, `DataError` when its calibration text is another now.
    """
    return apply_draft(loaded, Draft(plan, calibration), progress)


def apply_draft(loaded: LoadedModel, draft: Draft, progress: Progress | None = None) -> LoadedModel:
    """`apply_plan` for a plan that may be open. The last of the ``plans`` of what is returned is the settled one."""
    plan = draft.plan
    plan.check(loaded.graph)
    if plan.compensation is not None:
        plan = _compensate(loaded, draft, plan.compensation, progress)
    graph = cut(loaded.model, loaded.graph, plan.kept, loaded.family)
    return replace(loaded, graph=graph, plans=(*loaded.plans, plan))


def _compensate(loaded: LoadedModel, draft: Draft, how: Compensation, progress: Progress | None) -> PruningPlan:
    plan, calibration = draft.plan, draft.calibration
    if calibration is None:
        calibration = calibration_set(
            how.calibration, loaded.model, loaded.tokenizer, samples=how.samples, length=how.length, seed=plan.seed
        )
    # What a model writes depends on the last bit of its arithmetic, so on another machine it may write other text.
    if SELF not in sources_of(how.calibration) and calibration.fingerprint != how.fingerprint:
        raise DataError(f"'{how.calibration}' is not the text that this plan was made with; make a new plan")
    repaired = repair(
        loaded.model, loaded.graph, plan.kept, calibration,
        method=how.method, mix=how.mix, chooser=draft.chooser, progress=progress,
    )  # fmt: skip
    return _settled(loaded, plan, repaired.kept)


def save(loaded: LoadedModel, directory: Path, *, notes: Mapping[str, Any] | None = None) -> str:
    """Write the model as an ordinary Hugging Face directory; returns ``stock`` or ``shim`` (see `checkpoint`).

    ``notes``: further provenance (recovery settings, say), kept in ``llmpruner.json`` beside the plans.
    """
    record = {
        **(loaded.record or {}),
        **base_record(loaded),
        **(notes or {}),
        "llmpruner": __version__,
        "plans": [plan.model_dump(mode="json") for plan in loaded.plans],
        "base_config": {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"},
    }
    return save_checkpoint(
        loaded.model,
        directory,
        record=record,
        tokenizer=loaded.tokenizer,
        family=loaded.family,
        extra_files=_vocabulary(loaded.tokenizer),
    )


def _vocabulary(tokenizer: Any) -> list[Path]:
    """The SentencePiece model of a tokenizer: a fast tokenizer does not save it, and other formats need it."""
    file = Path(str(getattr(tokenizer, "vocab_file", None) or ""))
    return [file] if file.name == "tokenizer.model" and file.is_file() else []


def default_layers(loaded: LoadedConfig) -> tuple[int, ...]:
    """All layers but the family's protected share at both ends."""
    count = loaded.graph.num_layers
    first, last = (round(share * count) for share in loaded.family.protected_layers)
    return tuple(range(first, count - last))


def calibrate(
    loaded: LoadedModel, criterion: ImportanceCriterion, settings: PruneSettings, progress: Progress
) -> CalibrationSet | None:
    """The calibration set that these settings need; None when neither criterion nor compensation looks at text."""
    if criterion.signals <= {Signal.WEIGHT} and settings.compensate == "none" and settings.allocation not in MEASURED:
        return None
    writing = SELF in sources_of(settings.calibration)
    progress.status("The model writes its calibration text" if writing else f"Reading {settings.calibration}")
    return calibration_set(
        settings.calibration, loaded.model, loaded.tokenizer,
        samples=settings.samples, length=settings.length, seed=settings.seed,
    )  # fmt: skip


def _loss(
    loaded: LoadedModel,
    model: PreTrainedModel,
    graph: CouplingGraph,
    groups: Sequence[CoupledGroup],
    settings: PruneSettings,
    calibration: CalibrationSet | None,
    progress: Progress,
) -> Callable[[Kept], float] | None:
    """What a measured allocation goes by; None for the others, which look at scores alone."""
    if settings.allocation not in MEASURED or calibration is None:
        return None

    refit = settings.compensate == "refit"
    return Trials(model, graph, groups, loaded.family, calibration, refit=refit, progress=progress).loss


def _chooser(
    loaded: LoadedModel, criterion: ImportanceCriterion, settings: PruneSettings, groups: Sequence[CoupledGroup]
) -> Chooser | None:
    """What settles which units go after the allocation; None where the allocation does."""
    # Other allocations, and further steps, turn on which units go.
    if settings.compensate != "refit" or settings.allocation != "uniform" or settings.steps > 1:
        return None
    chooser = Chooser(criterion, settings.reduction, settings.round_to, settings.seed)
    return chooser if can_wait(criterion, loaded.graph, groups) else None


def _scored_on(
    calibration: CalibrationSet | None,
    criterion: ImportanceCriterion,
    settings: PruneSettings,
    chooser: Chooser | None,
) -> CalibrationSet | None:
    """What a repair reads, scores that have the last word read too: a ranking on little text is one for that text.
    Gradients cost more, and take fewer tokens."""
    if calibration is None or settings.compensate != "refit":
        return calibration
    gradients = criterion.signals & {Signal.GRAD, Signal.GRAD_SQ}
    return calibration.first(_FEWER_TOKENS) if chooser or gradients else calibration


def _estimation(
    criterion: ImportanceCriterion, settings: PruneSettings, calibration: CalibrationSet | None
) -> Estimation:
    looks = not criterion.signals <= {Signal.WEIGHT} or settings.allocation in MEASURED
    used = calibration if looks else None
    return Estimation(
        criterion=criterion.name,
        variant=criterion.variant,
        reduction=settings.reduction,
        calibration=used.source if used else None,
        fingerprint=used.fingerprint if used else None,
    )


def _compensation(settings: PruneSettings, calibration: CalibrationSet | None) -> Compensation | None:
    if settings.compensate == "none" or calibration is None:
        return None
    return Compensation(
        method=cast("Literal['refit', 'bias']", settings.compensate),
        mix=settings.mix,
        calibration=calibration.source,
        fingerprint=calibration.fingerprint,
        samples=settings.samples,
        length=settings.length,
    )


def _demand(
    whole: Cost, now: Cost, groups: Sequence[CoupledGroup], scope: Scope, target: Target, step: int, steps: int
) -> Demand:
    """What step number ``step`` of ``steps`` must remove so that its share of the target is reached after it.
    ``whole``: the cost of the dense model; ``now``: of what is left of it."""
    if target.by == "units":
        if steps > 1:
            raise SelectionError("--unit-ratio goes in one step; use --ratio for iterative pruning")
        units = {
            g.name: target.amount * (g.units if g.layer is not None else len(scope.allowed_units(g) or range(g.units)))
            for g in groups
        }
        return Demand(units=units)
    dense = whole.remaining()
    if target.by == "ratio":
        goal = round(dense * (1 - target.amount * (step / steps)))
        return Demand(amount=now.remaining() - goal)
    gone = dense - round(target.amount)
    if gone <= 0:
        raise SelectionError(f"--target-params {target.amount:,.0f} is not below the model's {dense:,} parameters")
    return Demand(amount=now.remaining() - (dense - ceil(gone * (step / steps))))


def _rescope(scope: Scope, loaded: LoadedModel, kept: Mapping[str, Any], settings: PruneSettings) -> Scope:
    """The scope in the layer numbers of the model after the cut."""
    numbers = layer_numbers(loaded.graph, kept)
    chosen = settings.layers or default_layers(loaded)
    return Scope(scope.kinds, tuple(numbers[n] for n in chosen if n in numbers))
