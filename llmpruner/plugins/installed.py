"""The installed plugins: all kinds of components, the catalog of what is installed, and its model types for
transformers."""

from __future__ import annotations

from ..calibration.base import CalibrationSource
from ..catalog import Catalog
from ..component import Component
from ..evaluation.bench import Runtime
from ..evaluation.evaluate import Metric
from ..exporters import Exporter
from ..models.family import ModelFamily
from ..models.reference import CheckpointReader
from ..pruning.allocation import Allocation
from ..pruning.budgets import Budget
from ..pruning.compensation.base import Compensation
from ..pruning.criteria.base import ImportanceCriterion
from ..pruning.methods import Method
from ..recipes import NamedRecipe
from ..recovery.base import RecoveryStrategy
from ..report.base import ReportSection
from .manager import PluginManager

KINDS: dict[str, type[Component]] = {
    base.kind: base
    for base in (
        ModelFamily, ImportanceCriterion, Allocation, Budget, Compensation, CalibrationSource, RecoveryStrategy,
        Metric, Exporter, Runtime, CheckpointReader, ReportSection, Method, NamedRecipe,
    )
}  # fmt: skip
"""Every kind of component by name, such as ``budget``: the base class of its components."""


def load_catalog() -> Catalog:
    """The catalog of the built-in components and of all installed plugins."""
    return Catalog(PluginManager())


def register() -> None:
    """Let AutoConfig and AutoModelForCausalLM load pruned checkpoints without remote code, for the model types of
    transformers and of the families of installed plugins. Repeated calls have no further effect."""
    from transformers import CONFIG_MAPPING

    from ..discovery.opening import register_models
    from ..models.modeling_llmpruner import MODEL_TYPE_PREFIX
    from ..models.modeling_llmpruner import register as register_types

    catalog = load_catalog()
    register_models(catalog)
    types = {*CONFIG_MAPPING, *(t for cls in catalog[ModelFamily].values() for t in cls.model_types)}
    register_types(sorted(t for t in types if not t.startswith(MODEL_TYPE_PREFIX)))
