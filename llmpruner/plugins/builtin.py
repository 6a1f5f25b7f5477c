"""The built-in components: a plugin like any other, named ``builtin``. Classes are imported when a hook is called:
``--help`` calls none of these, and would take a tenth of a second longer."""

from __future__ import annotations

from .hookspecs import hookimpl


@hookimpl
def llmpruner_model_families() -> list[type]:
    from ..discovery.family import AutoFamily

    return [AutoFamily]


@hookimpl
def llmpruner_importance_criteria() -> list[type]:
    from ..pruning.criteria.experts import ExpertContribution, ExpertFrequency, ExpertNorm, ExpertReap
    from ..pruning.criteria.layers import AngularBlock, AngularDistance, BlockInfluence
    from ..pruning.criteria.obs import OptimalBrainSurgeon
    from ..pruning.criteria.taylor import Fisher, Taylor
    from ..pruning.criteria.tokens import TokenUse
    from ..pruning.criteria.weights import L1, L2, ActivationNorm, Fluctuation, OutputEnergy, Pca, Random, WandaSp

    weights = [Random, L1, L2]
    forward = [WandaSp, OutputEnergy, Fluctuation, ActivationNorm, Pca, OptimalBrainSurgeon]
    experts = [ExpertReap, ExpertNorm, ExpertFrequency, ExpertContribution]
    layers = [BlockInfluence, AngularDistance, AngularBlock]
    return [*weights, Taylor, Fisher, *forward, *experts, *layers, TokenUse]


@hookimpl
def llmpruner_recovery_strategies() -> list[type]:
    from ..recovery.strategies import DistilStrategy, FullStrategy, LoraStrategy

    return [LoraStrategy, FullStrategy, DistilStrategy]


@hookimpl
def llmpruner_allocations() -> list[type]:
    from ..pruning.allocation import GlobalRanking, Sensitivity, Uniform

    return [Uniform, GlobalRanking, Sensitivity]


@hookimpl
def llmpruner_budgets() -> list[type]:
    from ..pruning.budgets import AllParameters, DecoderParameters, Macs, WeightBytes
    from ..pruning.kv_cache import KvCache

    return [DecoderParameters, AllParameters, WeightBytes, Macs, KvCache]


@hookimpl
def llmpruner_compensations() -> list[type]:
    from ..pruning.compensation.builtin import BiasShift, NoCompensation, Refit

    return [Refit, BiasShift, NoCompensation]


@hookimpl
def llmpruner_calibration_sources() -> list[type]:
    from ..calibration.sources import ChatSource, SelfWritten, TextSource

    return [SelfWritten, TextSource, ChatSource]


@hookimpl
def llmpruner_metrics() -> list[type]:
    from ..evaluation.answers import AnswersMetric, GivenAnswersMetric
    from ..evaluation.metrics import PerplexityMetric, SizeMetric, TasksMetric

    return [SizeMetric, PerplexityMetric, TasksMetric, AnswersMetric, GivenAnswersMetric]


@hookimpl
def llmpruner_exporters() -> list[type]:
    from ..exporters import StockExporter

    return [StockExporter]


@hookimpl
def llmpruner_runtimes() -> list[type]:
    from ..evaluation.runtime import TransformersRuntime

    return [TransformersRuntime]


@hookimpl
def llmpruner_report_sections() -> list[type]:
    from ..report.history import OriginSection, PlanSection, RecoverySection
    from ..report.measured import AnswersSection, CostSection, QualitySection
    from ..report.summary import ComparisonSection, SummarySection

    sections = [SummarySection, ComparisonSection, QualitySection, AnswersSection, CostSection]
    return [*sections, PlanSection, RecoverySection, OriginSection]


@hookimpl
def llmpruner_methods() -> list[type]:
    from ..pruning.methods import Best, Fast, LlmPruner

    return [Best, Fast, LlmPruner]


@hookimpl
def llmpruner_recipes() -> list[type]:
    from ..recipes import DemoRecipe, ExpertsRecipe, PaperRecipe, QualityRecipe

    return [PaperRecipe, QualityRecipe, ExpertsRecipe, DemoRecipe]
