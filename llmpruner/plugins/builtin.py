"""The built-in components: an ordinary plugin that is always there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..budgets.base import Budget
from ..compensation.base import Compensation
from ..data.source import CalibrationSource
from ..evaluation.base import Metric
from ..export.base import Exporter
from ..families.family import ModelFamily
from ..importance.activation import ActivationNorm, Fluctuation, OutputEnergy, Pca, WandaSp
from ..importance.base import ImportanceCriterion
from ..importance.depth import AngularDistance, BlockInfluence
from ..importance.magnitude import L1, L2, Random
from ..importance.obs import OptimalBrainSurgeon
from ..importance.taylor import Taylor
from ..methods.base import Method
from ..recovery.base import RecoveryStrategy
from ..recovery.full import FullStrategy
from ..recovery.lora import LoraStrategy
from ..report.base import ReportSection
from ..selection.base import Allocation
from .hookspecs import hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class AutoFamily(ModelFamily):
    """Any decoder: structure is discovered by tracing, and every cut proved on a small model. Choose it by name."""

    name = "auto"

    def matches(self, config: PreTrainedConfig) -> bool:
        """Never: a family is not guessed."""
        del config
        return False


@hookimpl
def llmpruner_model_families() -> list[type[ModelFamily]]:
    return [AutoFamily]


@hookimpl
def llmpruner_importance_criteria() -> list[type[ImportanceCriterion]]:
    weights: list[type[ImportanceCriterion]] = [Random, L1, L2]
    forward = [WandaSp, OutputEnergy, Fluctuation, ActivationNorm, Pca, OptimalBrainSurgeon]
    return [*weights, Taylor, *forward, BlockInfluence, AngularDistance]


@hookimpl
def llmpruner_recovery_strategies() -> list[type[RecoveryStrategy]]:
    return [LoraStrategy, FullStrategy]


@hookimpl
def llmpruner_allocations() -> list[type[Allocation]]:
    return []


@hookimpl
def llmpruner_budgets() -> list[type[Budget]]:
    return []


@hookimpl
def llmpruner_compensations() -> list[type[Compensation]]:
    return []


@hookimpl
def llmpruner_calibration_sources() -> list[type[CalibrationSource]]:
    return []


@hookimpl
def llmpruner_metrics() -> list[type[Metric]]:
    return []


@hookimpl
def llmpruner_exporters() -> list[type[Exporter]]:
    return []


@hookimpl
def llmpruner_report_sections() -> list[type[ReportSection]]:
    return []


@hookimpl
def llmpruner_methods() -> list[type[Method]]:
    return []
