"""The settings of a training that all strategies share, as they are recorded."""

from __future__ import annotations

from typing import Any

from ..settings import RecoverSettings, option_of

_NOT_SHARED = {"data", "strategy", "limit", "merge", "settings", "report_to"}
"""Fields of `RecoverSettings` that are not shared by strategies, or recorded separately, or that change no result."""


def shared_settings(settings: RecoverSettings) -> dict[str, Any]:
    """The settings that all strategies share, as JSON values."""
    of_strategy = {name for name in RecoverSettings.model_fields if option_of(RecoverSettings, name).sets}
    return settings.model_dump(mode="json", exclude=_NOT_SHARED | of_strategy)
