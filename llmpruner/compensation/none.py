"""No compensation."""

from __future__ import annotations

from .base import Compensation, Repaired, RepairTask


class NoCompensation(Compensation):
    """Leaves all weights as they are."""

    name = "none"
    summary = "weights stay as they are"
    reads_text = False

    def repair(self, task: RepairTask) -> Repaired:
        return Repaired(dict(task.kept))
