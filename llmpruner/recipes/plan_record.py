"""A plan's record of the job that it was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..structure.plan import (
    BaseRef,
    CompensationRecord,
    EstimationRecord,
    PruningPlan,
    SelectionRecord,
    Target,
    cuts_of,
    structure_of,
)
from .wanted import scope_of, widths_of

if TYPE_CHECKING:
    from ..calibration.calibration import CalibrationSet
    from ..models.model import Model
    from ..structure.kept import Kept
    from .jobs import PruneJob


def plan_of(
    model: Model,
    job: PruneJob,
    kept: Kept,
    calibration: CalibrationSet | None,
    measured: Mapping[str, Any] | None,
) -> PruningPlan:
    """The plan that keeps ``kept``. ``measured``: what the budget measured; None where it did not."""
    scored = calibration if job.scores_read_text else None
    return PruningPlan(
        base=BaseRef(
            model=model.ref,
            revision=getattr(model.config, "_commit_hash", None),
            structure=structure_of(model.graph),
        ),
        family=model.family.name,
        estimation=EstimationRecord(
            criterion=job.criterion.name,
            settings=job.criterion.record(),
            reduction=job.reduction,
            calibration=scored.source if scored else None,
            sources=job.calibration.text.record() if scored and job.calibration else {},
            fingerprint=scored.fingerprint if scored else None,
        ),
        selection=SelectionRecord(
            kinds=job.kinds,
            layers=scope_of(job, model).layers,
            allocation=job.allocation.name,
            settings=job.allocation.record(),
            normalization=job.normalization,
            steps=job.steps,
            shape=job.shape,
            round_to=widths_of(job, model).round_to,
        ),
        compensation=_compensation(job, calibration),
        target=_target(job, measured),
        seed=job.seed,
        cuts=cuts_of(model.graph, kept),
    )


def _target(job: PruneJob, measured: Mapping[str, Any] | None) -> Target:
    if job.by != "ratio":
        return Target(by=job.by, amount=job.amount)
    recorded = None if measured is None else dict(measured)
    return Target(
        by="ratio", amount=job.amount, budget=job.budget.name, settings=job.budget.record(), measured=recorded
    )


def _compensation(job: PruneJob, calibration: CalibrationSet | None) -> CompensationRecord | None:
    if job.compensation.name == "none":
        return None
    text = calibration if job.compensation.reads_text else None
    samples, length = text.input_ids.shape if text is not None else (None, None)
    return CompensationRecord(
        name=job.compensation.name,
        settings=job.compensation.record(),
        calibration=text.source if text else None,
        sources=job.calibration.text.record() if text and job.calibration else {},
        fingerprint=text.fingerprint if text else None,
        samples=samples,
        length=length,
    )
