"""Evaluation: perplexity, lm-eval tasks, and cost. The values are light; measuring imports torch."""

from .report import Evaluation, Line, Measurement, PerplexityResult, Size, Speed, side_by_side

__all__ = ["Evaluation", "Line", "Measurement", "PerplexityResult", "Size", "Speed", "side_by_side"]
