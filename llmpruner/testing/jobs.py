"""Small pruning jobs for tests."""

from __future__ import annotations

from typing import Any

from ..budgets.weights import DecoderParameters
from ..compensation.none import NoCompensation
from ..data.calibration import CalibrationText, Part
from ..families.self_written import SelfWritten
from ..importance.base import ImportanceCriterion
from ..importance.magnitude import L1
from ..loading.model import Model
from ..plugins.catalog import Catalog
from ..plugins.host import plugin_manager
from ..recipes.jobs import CalibrationJob, PruneJob
from ..recipes.pipeline import apply_plan, make_plan
from ..selection.uniform import Uniform
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
