"""Evaluation: size, perplexity, lm-eval tasks, speed, and the metrics of plugins. Importing it imports no torch."""

from .base import Metric, MetricSubject, Row
from .results import Evaluation, Measurement, PerplexityResult, Size, Speed
from .table import Evaluations, Line, side_by_side

__all__ = [
    "Evaluation",
    "Evaluations",
    "Line",
    "Measurement",
    "Metric",
    "MetricSubject",
    "PerplexityResult",
    "Row",
    "Size",
    "Speed",
    "side_by_side",
]
