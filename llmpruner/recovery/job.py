"""The settings of a recovery, what they name, and what is refused without a model. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..errors import MissingExtraError, SettingsError
from ..settings import RecoverSettings
from .base import RecoveryStrategy
from .data import check_data
from .dense_text import DenseText, dense_text_in

if TYPE_CHECKING:
    from ..plugins.catalog import Catalog


@dataclass(frozen=True)
class RecoverJob:
    """The settings of a recovery, and what they name. ``dense_text``: of the data, what the dense model writes."""

    settings: RecoverSettings
    strategy: RecoveryStrategy
    dense_text: DenseText | None = None

    @property
    def reads_dense(self) -> bool:
        """Whether the dense model writes examples, or teaches."""
        return self.strategy.needs_dense or self.dense_text is not None


def recover_job(settings: RecoverSettings, catalog: Catalog) -> RecoverJob:
    """Raises `SettingsError` (or `UnknownNameError`, or `DataError`) for settings that are wrong."""
    strategy = catalog.strategies.create_only(settings.strategy, settings.settings)
    return RecoverJob(settings, strategy, dense_text_in(settings.data))


def check_recover(job: RecoverJob) -> None:
    """Refuse what needs no model to be seen: missing data or libraries, and FSDP."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise SettingsError("recover keeps the whole model in every process; launch it without FSDP")
    if job.strategy.adapters and find_spec("peft") is None:
        raise MissingExtraError("peft", "recover")
    check_data(job.settings.data)
