"""The section ``summary``: what was won and lost, in one sentence and four figures."""

from __future__ import annotations

from ..amounts import bytes_text, count_text
from .base import ReportSection, ReportSubject
from .figures import Pair, figures, sentence
from .templates import rendered


class SummarySection(ReportSection):
    """Nothing without evidence."""

    name = "summary"
    summary = "what was won and lost: size, speed, quality"
    order = 0

    def render(self, subject: ReportSubject) -> str | None:
        if subject.evidence is None:
            return None
        found = figures(subject.evidence)
        tiles = [
            _tile(found.parameters, count_text),
            _tile(found.weights, bytes_text),
            _tile(found.decode, "{:,.1f}".format),
            _tile(found.perplexity, "{:,.2f}".format),
            _tile(found.tasks, "{:.1%}".format),
        ]
        return rendered(
            "summary.html.j2", sentence=sentence(subject), tiles=[one for one in tiles if one], found=found,
            name=subject.evidence.name,
        )  # fmt: skip

    def style(self) -> str:
        return rendered("summary.css.j2")


def _tile(pair: Pair | None, text: object) -> dict[str, str] | None:
    if pair is None:
        return None
    assert callable(text)
    return {
        "label": pair.label, "dense": text(pair.dense), "pruned": text(pair.pruned), "change": f"{pair.ratio - 1:+.1%}"
    }  # fmt: skip
