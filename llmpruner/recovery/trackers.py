"""Programs that get the losses while training."""

from __future__ import annotations

import os
from typing import Any

from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..engine.ranks import Ranks
from .base import RecoveryJob


def tracker_callbacks(job: RecoveryJob) -> list[Any]:
    """transformers' callbacks of the programs in ``report_to``. TensorBoard's files go into a folder beside that of
    the training, named ``….tensorboard``, unless ``TENSORBOARD_LOGGING_DIR`` names another."""
    made: list[Any] = []
    names = job.settings.report_to or () if Ranks.current().first else ()
    for name in names:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or job.work_dir.with_suffix(".tensorboard")
            made.append(TensorBoardCallback(SummaryWriter(log_dir=str(folder))))
        else:
            made.append({"wandb": WandbCallback, "trackio": TrackioCallback}[name]())
    return made
