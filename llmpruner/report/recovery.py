"""The section ``recovery``: the trainings of a model, with their losses."""

from __future__ import annotations

from ..recovery.losses import loss_text
from .base import ReportSection, ReportSubject
from .loss_curve import loss_curve
from .templates import rendered


class RecoverySection(ReportSection):
    """A drawing of the losses for each training; nothing for a model that was not trained."""

    name = "recovery"
    summary = "the losses of every training that restored quality"
    order = 25

    def render(self, subject: ReportSubject) -> str | None:
        done = [one for one in subject.record.get("recovery") or () if one["losses"]]
        # The losses of one layer after the other are no curve.
        trainings = [(one, loss_text(one), None if one.get("layers") else loss_curve(one)) for one in done]
        return rendered("recovery.html.j2", trainings=trainings) if done else None
