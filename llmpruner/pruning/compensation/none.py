"""No compensation."""

from __future__ import annotations

from .base import Compensation, Repaired, RepairTask


class NoCompensation(Compensation):
    """Changes no weights."""

    name = "none"
    summary = "weights do not change"
    reads_text = False
    changes_readers_alone = True

    def repair(self, task: RepairTask) -> Repaired:
        return Repaired(dict(task.kept))
