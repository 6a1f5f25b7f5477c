"""The section ``scores``: how the scores of the units of every layer are distributed, and where the cut is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .base import ReportSection, ReportSubject
from .templates import rendered

_WIDTH, _HEIGHT, _FOOT = 108, 44, 14


@dataclass(frozen=True)
class Bar:
    """One bin, in pixels of a panel: its left edge and width; tops and heights of the removed and of the kept units."""

    x: float
    width: float
    removed: tuple[float, float]
    kept: tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """The scores of one group. ``cut``: pixels to the cut line; ``note``: the same in words."""

    label: str
    bars: tuple[Bar, ...]
    cut: float
    note: str


class ScoresSection(ReportSection):
    """A row of small histograms for each kind of unit; nothing where the record has no scores."""

    name = "scores"
    summary = "the distribution of the scores of each layer's units, and the cut"
    order = 21

    def render(self, subject: ReportSubject) -> str | None:
        if subject.evidence is None:
            return None
        work = subject.record.get("work") or ()
        plans = subject.record.get("plans") or ()
        scored = [(plan, (one or {}).get("scores") or {}) for plan, one in zip(plans, work, strict=False)]
        last = next((pair for pair in reversed(scored) if pair[1]), None)
        if last is None:
            return None
        plan, scores = last
        kinds: dict[str, list[Panel]] = {}
        for name, spread in scores.items():
            cut = plan["cuts"][name]
            label = str(cut["layer"]) if cut["layer"] is not None else name
            kinds.setdefault(cut["kind"], []).append(panel(label, spread))
        return rendered(
            "scores.html.j2", kinds=kinds, criterion=plan["estimation"]["criterion"], width=_WIDTH,
            height=_HEIGHT, foot=_FOOT,
        )  # fmt: skip

    def style(self) -> str:
        return rendered("scores.css.j2")


def panel(label: str, spread: Mapping[str, Any]) -> Panel:
    """``spread``: see `llmpruner.pruning.criteria.spread.Spread`."""
    kept, removed = spread["kept"], spread["removed"]
    most = max([k + r for k, r in zip(kept, removed, strict=True)] + [1])
    width = _WIDTH / len(kept)
    bars = []
    for place, (stays, goes) in enumerate(zip(kept, removed, strict=True)):
        low, high = _HEIGHT * goes / most, _HEIGHT * stays / most
        down = (round(_HEIGHT - low, 1), round(low, 1))
        up = (round(_HEIGHT - low - high, 1), round(high, 1))
        bars.append(Bar(round(place * width, 1), round(width - 1, 1), down, up))
    gone = sum(removed)
    note = (
        f"{label}: {gone:,} of {gone + sum(kept):,} units removed, scores {spread['low']:.3g} to {spread['high']:.3g}"
    )
    return Panel(label, tuple(bars), round(_cut(kept, removed) * width, 1), note)


def _cut(kept: Sequence[int], removed: Sequence[int]) -> float:
    """The place between bins with the fewest kept units to its left and removed ones to its right."""
    wrong = [sum(kept[:place]) + sum(removed[place:]) for place in range(len(kept) + 1)]
    return wrong.index(min(wrong))
