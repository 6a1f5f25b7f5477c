"""The built-in components: a plugin like any other, named ``builtin``. Hooks import the classes, to keep ``--help``
fast."""

from __future__ import annotations

from functools import partial

from . import hookspecs

hookimpl = partial(hookspecs.hookimpl, tryfirst=True)
"""Of two components of one name, the first is used."""


@hookimpl
def llmpruner_model_families() -> list[type]:
    from ..models.family import AutoFamily

    return [AutoFamily]


@hookimpl
def llmpruner_importance_criteria() -> list[type]:
    from ..pruning.criteria import experts, layers, taylor, tokens, weights

    return [
        weights.Random, weights.L1, weights.L2, weights.WandaSp, weights.OutputEnergy, weights.Fluctuation,
        weights.ActivationNorm, weights.Pca, weights.OptimalBrainSurgeon, taylor.Taylor, taylor.Fisher,
        experts.ExpertReap, experts.ExpertNorm, experts.ExpertFrequency, experts.ExpertContribution,
        layers.BlockInfluence, layers.AngularDistance, layers.AngularBlock, tokens.TokenUse,
    ]  # fmt: skip


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
    from ..pruning.budgets import AllParameters, DecoderParameters, KvCache, Macs, WeightBytes

    return [DecoderParameters, AllParameters, WeightBytes, Macs, KvCache]


@hookimpl
def llmpruner_compensations() -> list[type]:
    from ..pruning.compensation.compensations import BiasShift, NoCompensation, Refit

    return [Refit, BiasShift, NoCompensation]


@hookimpl
def llmpruner_calibration_sources() -> list[type]:
    from ..calibration.calibration import ChatSource, SelfWritten, TextSource

    return [SelfWritten, TextSource, ChatSource]


@hookimpl
def llmpruner_metrics() -> list[type]:
    from ..evaluation.metrics import AnswersMetric, GivenAnswersMetric, PerplexityMetric, SizeMetric
    from ..evaluation.tasks import TasksMetric

    return [SizeMetric, PerplexityMetric, TasksMetric, AnswersMetric, GivenAnswersMetric]


@hookimpl
def llmpruner_exporters() -> list[type]:
    from ..exporters import StockExporter

    return [StockExporter]


@hookimpl
def llmpruner_runtimes() -> list[type]:
    from ..evaluation.bench import TransformersRuntime

    return [TransformersRuntime]


@hookimpl
def llmpruner_report_sections() -> list[type]:
    from ..report import sections, summary

    return [
        summary.SummarySection, summary.ComparisonSection, sections.QualitySection, sections.AnswersSection,
        sections.CostSection, sections.PlanSection, sections.RecoverySection, sections.OriginSection,
    ]  # fmt: skip


@hookimpl
def llmpruner_methods() -> list[type]:
    from ..pruning.methods import Best, Fast, LlmPruner

    return [Best, Fast, LlmPruner]


@hookimpl
def llmpruner_recipes() -> list[type]:
    from ..recipes import DemoRecipe, ExpertsRecipe, PaperRecipe, QualityRecipe

    return [PaperRecipe, QualityRecipe, ExpertsRecipe, DemoRecipe]
