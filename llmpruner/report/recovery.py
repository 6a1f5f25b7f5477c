"""The section ``recovery``: the trainings of a model, with their losses."""

from __future__ import annotations

from .base import ReportSection, ReportSubject
from .curve import loss_curve
from .templates import rendered


class RecoverySection(ReportSection):
    """A drawing of the losses for each training; nothing for a model that was not trained."""

    name = "recovery"
    summary = "the losses of every training that restored quality"
    order = 25

    def render(self, subject: ReportSubject) -> str | None:
        done = [one for one in subject.record.get("recovery") or () if one["losses"]]
        return rendered("recovery.html.j2", trainings=[(one, loss_curve(one)) for one in done]) if done else None
