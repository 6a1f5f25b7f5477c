"""The built-in components: a plugin like any other, named ``builtin``."""

from __future__ import annotations

from ..benching.base import Runtime
from ..benching.runtimes import LlamaCppRuntime, StaticRuntime, TransformersRuntime, VllmRuntime
from ..budgets.base import Budget
from ..budgets.kv_cache import KvCache
from ..budgets.latency import Latency
from ..budgets.macs import Macs
from ..budgets.weights import AllParameters, DecoderParameters, WeightBytes
from ..compensation.base import Compensation
from ..compensation.bias import BiasShift
from ..compensation.none import NoCompensation
from ..compensation.refit import Refit
from ..data.self_written import SelfWritten
from ..data.source import CalibrationSource
from ..data.text import TextSource
from ..evaluation.base import Metric
from ..evaluation.metrics import PerplexityMetric, SizeMetric, SpeedMetric, TasksMetric
from ..exporters.base import Exporter
from ..exporters.gguf.exporter import GgufExporter
from ..exporters.nemotron_nas import NemotronNasExporter
from ..exporters.stock import StockExporter
from ..exporters.torchao_weights import TorchAoExporter
from ..families.auto import AutoFamily
from ..families.family import ModelFamily
from ..importance.activation import ActivationNorm, Fluctuation, OutputEnergy, Pca, WandaSp
from ..importance.base import ImportanceCriterion
from ..importance.depth import AngularDistance, BlockInfluence
from ..importance.magnitude import L1, L2, Random
from ..importance.obs import OptimalBrainSurgeon
from ..importance.taylor import Taylor
from ..methods.base import Method
from ..methods.presets import Best, Fast, LlmPruner
from ..recovery.base import RecoveryStrategy
from ..recovery.distil import DistilStrategy
from ..recovery.full import FullStrategy
from ..recovery.lora import LoraStrategy
from ..report.base import ReportSection
from ..report.block import BlockSection
from ..report.groups import GroupsSection
from ..report.plan import PlanSection
from ..selection.base import Allocation
from ..selection.ranking import GlobalRanking
from ..selection.search import Search
from ..selection.sensitivity import Sensitivity
from ..selection.uniform import Uniform
from .hookspecs import hookimpl


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
    return [LoraStrategy, FullStrategy, DistilStrategy]


@hookimpl
def llmpruner_allocations() -> list[type[Allocation]]:
    return [Uniform, GlobalRanking, Sensitivity, Search]


@hookimpl
def llmpruner_budgets() -> list[type[Budget]]:
    return [DecoderParameters, AllParameters, WeightBytes, Macs, KvCache, Latency]


@hookimpl
def llmpruner_compensations() -> list[type[Compensation]]:
    return [Refit, BiasShift, NoCompensation]


@hookimpl
def llmpruner_calibration_sources() -> list[type[CalibrationSource]]:
    return [SelfWritten, TextSource]


@hookimpl
def llmpruner_metrics() -> list[type[Metric]]:
    return [SizeMetric, PerplexityMetric, SpeedMetric, TasksMetric]


@hookimpl
def llmpruner_exporters() -> list[type[Exporter]]:
    return [StockExporter, NemotronNasExporter, GgufExporter, TorchAoExporter]


@hookimpl
def llmpruner_runtimes() -> list[type[Runtime]]:
    return [TransformersRuntime, StaticRuntime, LlamaCppRuntime, VllmRuntime]


@hookimpl
def llmpruner_report_sections() -> list[type[ReportSection]]:
    return [GroupsSection, PlanSection, BlockSection]


@hookimpl
def llmpruner_methods() -> list[type[Method]]:
    return [Best, Fast, LlmPruner]
