"""Checks of jobs that need no model."""

from __future__ import annotations

from importlib.util import find_spec

from ..calibration.conversations import example
from ..calibration.documents import EXPECTED_EXAMPLES, check_source
from ..calibration.mixture import parse_mixture
from ..errors import MissingExtraError
from ..pruning.job import PruneJob
from ..recovery.dense_text import dense_text_in
from .jobs import EvaluateJob, RecoverJob


def check_text(job: PruneJob) -> None:
    """Raise `DataError` for calibration text that is missing or malformed."""
    if job.calibration is not None:
        job.calibration.text.check()


def check_recover(job: RecoverJob) -> None:
    """Raise `DataError` for training data that is missing or malformed, and as `check_adapters`."""
    check_adapters(job)
    own = dense_text_in(job.settings.data)
    for source, expected in (
        (job.settings.data, f"{EXPECTED_EXAMPLES}, or self, self:N or self-text"),
        (job.settings.validation_data, EXPECTED_EXAMPLES),
    ):
        for part in parse_mixture(source) if source is not None else ():
            if own is None or part.source != own.source:
                check_source(part.source, example, expected)


def check_adapters(job: RecoverJob) -> None:
    """Raise `MissingExtraError` where the library of adapters is needed and not installed."""
    if job.strategy.adapters and find_spec("peft") is None:
        raise MissingExtraError("peft", "recover")


def check_metrics(job: EvaluateJob) -> None:
    """Read the texts and tasks of all metrics. Raises `DataError` for those that are missing or malformed."""
    for metric in job.metrics:
        metric.prepare()
