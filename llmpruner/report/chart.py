"""Charts of points and lines as SVG elements, in the colours of the page. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10

from .loss_curve import Tick, round_numbers
from .templates import rendered

_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 20, 16, 44
_ROOM = 0.06
"""Share of the range of an axis that is left free at its ends."""


@dataclass(frozen=True)
class Point:
    """``note``: what a pointer over it, or a screen reader, gives; ``label``: written beside it. ``ring``: marked."""

    x: float
    y: float
    note: str = ""
    label: str = ""
    ring: bool = False


@dataclass(frozen=True)
class Series:
    """``accent``: in the colour of the page; else grey. ``dashes``: of the line, as in SVG; empty for a whole one."""

    name: str
    points: tuple[Point, ...]
    accent: bool = False
    dashes: str = ""


@dataclass(frozen=True)
class Chart:
    """``x``, ``y``: titles of the axes; ``what``: of the whole, for screen readers. ``log``: whether the axis upwards
    is logarithmic; all values on it must be above zero then."""

    what: str
    x: str
    y: str
    series: tuple[Series, ...]
    log: bool = False
    width: int = 640
    height: int = 320


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[Tick]:
        values = _powers(self.low, self.high) if self.log else round_numbers(self.low, self.high)
        return [Tick(self.at(value), f"{value:,.10g}") for value in values]


def drawn(chart: Chart) -> str:
    """The SVG element. The chart needs at least one point."""
    points = [point for series in chart.series for point in series.points]
    across = _axis([p.x for p in points], _LEFT, chart.width - _RIGHT)
    up = _axis([p.y for p in points], chart.height - _BOTTOM, _TOP, log=chart.log)
    lines = [
        (series, [(across.at(p.x), up.at(p.y), p) for p in series.points], " ".join(
            f"{across.at(p.x)},{up.at(p.y)}" for p in series.points
        ))
        for series in chart.series
    ]  # fmt: skip
    return rendered(
        "chart.svg.j2", chart=chart, lines=lines, left=_LEFT, right=chart.width - _RIGHT, top=_TOP,
        bottom=chart.height - _BOTTOM, across=across.ticks(), up=up.ticks(),
        labels=_labels([place for _, places, _ in lines for place in places], chart.width - _RIGHT),
    )  # fmt: skip


@dataclass(frozen=True)
class _Label:
    """Where a label stands, and its box: left, top, width, height."""

    x: float
    y: float
    anchor: str
    box: tuple[float, float, float, float]


def _labels(places: Sequence[tuple[float, float, Point]], right: float) -> dict[Point, _Label]:
    """Beside each point that has one, or above or below it, where it covers no other point and no earlier label."""
    points = [(x - 8, y - 8, 16.0, 16.0) for x, y, _ in places]
    found: dict[Point, _Label] = {}
    for number, (x, y, point) in enumerate(places):
        if not point.label:
            continue
        width = 6.6 * len(point.label)
        ways = [_label(x + 12, y + 4, "start", width), _label(x - 12, y + 4, "end", width)]
        ways += [
            _label(x, y - 14, "middle", width),
            _label(x, y + 22, "middle", width),
            _label(x, y + 22, "start", width),
        ]
        others = [*points[:number], *points[number + 1 :], *(one.box for one in found.values())]
        inside = [way for way in ways if way.box[0] > _LEFT and way.box[0] + width < right] or ways
        # Where every place is taken, the first is as good as another.
        found[point] = next((way for way in inside if not any(_meet(way.box, box) for box in others)), inside[0])
    return found


def _label(x: float, y: float, anchor: str, width: float) -> _Label:
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return _Label(round(x, 1), round(y, 1), anchor, (left, y - 11, width, 14.0))


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return (
        one[0] < other[0] + other[2] and other[0] < one[0] + one[2]
        and one[1] < other[1] + other[3] and other[1] < one[1] + one[3]
    )  # fmt: skip


def _axis(values: Sequence[float], start: float, end: float, *, log: bool = False) -> _Axis:
    low, high = min(values), max(values)
    if log:
        low, high = (low / 1.2, high * 1.2)
        return _Axis(low, high, start, end, log=True)
    room = _ROOM * (high - low) or abs(high) * _ROOM or 1.0
    return _Axis(low - room, high + room, start, end)


def _powers(low: float, high: float) -> list[float]:
    """Round numbers between ``low`` and ``high`` for a logarithmic axis: 1, 2 and 5 times powers of ten, or those of
    a linear axis where they are fewer than three."""
    found = [f * 10.0**n for n in range(floor(log10(low)), floor(log10(high)) + 1) for f in (1, 2, 5)]
    inside = [round(value, 12) for value in found if low <= value <= high]
    return inside if len(inside) > 2 else [value for value in round_numbers(low, high) if value > 0]
