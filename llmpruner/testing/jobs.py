"""Small pruning jobs for tests."""

from __future__ import annotations

from typing import Any

from ..calibration.calibration import CalibrationText, Part
from ..calibration.self_written import SelfWritten
from ..models.model import Model
from ..plugins.catalog import Catalog
from ..plugins.host import plugin_manager
from ..pruning.allocation.uniform import Uniform
from ..pruning.budgets.weights import DecoderParameters
from ..pruning.compensation.none import NoCompensation
from ..pruning.criteria.base import ImportanceCriterion
from ..pruning.criteria.magnitude import L1
from ..recipes.jobs import CalibrationJob, PruneJob
from ..recipes.pipeline import apply_plan, make_plan
from ..structure.plan import PruningPlan


def small_job(criterion: ImportanceCriterion | None = None, **changes: Any) -> PruneJob:
    """A job that removes a fifth of the decoder's parameters as MLP channels, in equal shares and without compensation,
    by ``criterion`` (default: l1) on one generated sample of four tokens. ``changes``: fields of `PruneJob` to
    replace."""
    text = CalibrationText("self", (Part(SelfWritten(), ""),))
    values: dict[str, Any] = {
        "by": "ratio",
        "amount": 0.2,
        "budget": DecoderParameters(),
        "kinds": ("mlp",),
        "layers": None,
        "shape": "free",
        "round_to": None,
        "criterion": criterion or L1(),
        "reduction": "sum",
        "allocation": Uniform(),
        "normalization": "none",
        "steps": 1,
        "compensation": NoCompensation(),
        "calibration": CalibrationJob(text, samples=1, length=4, fixed_length=True),
        "seed": 0,
    }
    return PruneJob(**{**values, **changes})


def pruned_by(model: Model, job: PruneJob) -> Model:
    """``model``, cut in place by the plan of ``job``."""
    plan, _ = make_plan(model, job)
    return cut_by(model, plan)


def cut_by(model: Model, plan: PruningPlan) -> Model:
    """``model``, cut in place by ``plan``, with the built-in components alone."""
    return apply_plan(model, plan, Catalog(plugin_manager(entry_points=False)))
