"""The calibration text of a job."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from ..calibration.calibration import CalibrationSet
from ..engine.signals import GRADIENTS
from ..models.positions import positions_of
from ..progress import QUIET, Progress

if TYPE_CHECKING:
    from ..engine.journal import Journal
    from ..engine.ranks import Ranks
    from ..models.model import Model, Structure
    from .jobs import CalibrationJob, PruneJob

_LOG = logging.getLogger("llmpruner")

GRADIENT_TOKENS = 32768
"""Calibration tokens for scores that need gradients, where a compensation reads more text."""


def journaled(
    journal: Journal | None, model: Model, job: PruneJob, progress: Progress, ranks: Ranks
) -> CalibrationSet | None:
    """The calibration set of a job, or of the interrupted run that is continued."""
    earlier = None if journal is None else journal.load("calibration")
    if earlier is not None:
        return CalibrationSet(torch.tensor(earlier["input_ids"]), earlier["source"], tuple(earlier.get("parts", ())))
    made = ranks.from_first(lambda: calibrate(model, job, progress))
    if journal is not None and made is not None:
        record = {"input_ids": made.input_ids.tolist(), "source": made.source, "parts": made.parts}
        journal.store("calibration", record)
    return made


def calibrate(model: Model, job: PruneJob, progress: Progress = QUIET) -> CalibrationSet | None:
    """The calibration set of a job; None when no component reads text."""
    if job.calibration is None:
        return None
    text = job.calibration.text
    progress.status("The model writes its calibration text" if text.writes else f"Reading {text.text}")
    with model.weights.outside():
        found = text.sample(
            model.model, model.tokenizer,
            samples=job.calibration.samples, length=length_for(job.calibration, model), seed=job.seed,
            progress=progress, family=model.family,
        )  # fmt: skip
    for warning in found.doubts():
        _LOG.warning(warning)
    return found


def length_for(calibration: CalibrationJob, structure: Structure) -> int:
    """Tokens per sample; a default is limited to the model's positions."""
    limit = positions_of(structure.config) or calibration.length
    return calibration.length if calibration.fixed_length else min(calibration.length, limit)


def scored_on(calibration: CalibrationSet | None, job: PruneJob) -> CalibrationSet | None:
    """The part of the calibration set for scores: all of it, but `GRADIENT_TOKENS` tokens for gradients, which take
    more time."""
    if calibration is None or not job.compensation.ranks_again:
        return calibration
    return calibration.first(GRADIENT_TOKENS) if job.criterion.signals & GRADIENTS else calibration
