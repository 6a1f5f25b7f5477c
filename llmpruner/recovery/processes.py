"""What the processes of one run can train together."""

from __future__ import annotations

import os

from ..engine.ranks import Ranks
from ..errors import SettingsError
from ..settings import LoadSettings, RecoverSettings
from .schedule import micro_batch


def check_processes(settings: RecoverSettings, load: LoadSettings) -> None:
    """Raise `SettingsError` for what they cannot, before anything is read."""
    micro_batch(settings, Ranks.current().count)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if load.device == "cpu":
            raise SettingsError("FSDP needs GPUs, as accelerate uses it with them alone; give --device cuda")
        if settings.minutes is not None:
            raise SettingsError("--minutes cannot be used with FSDP; give --max-steps")
