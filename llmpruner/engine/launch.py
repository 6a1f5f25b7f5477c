"""Whether a launcher started this process together with others. Imports no torch."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether ``torchrun`` or ``accelerate launch`` started several processes, of which this is one."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
