"""Checks of jobs that need no model."""

from __future__ import annotations

from ..pruning.job import PruneJob
from .jobs import EvaluateJob


def check_text(job: PruneJob) -> None:
    """Raise `DataError` for calibration text that is missing or malformed."""
    if job.calibration is not None:
        job.calibration.text.check()


def check_metrics(job: EvaluateJob) -> None:
    """Read the texts and tasks of all metrics. Raises `DataError` for those that are missing or malformed."""
    for metric in job.metrics:
        metric.prepare()
