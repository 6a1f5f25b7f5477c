"""Charts of points and lines as SVG elements, in the colours of the page. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from .base import rendered

_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 20, 16, 44
_CHARACTER = 6.6
"""Width of a character of a label, in pixels."""
_ROOM = 0.06
"""Share of the range of an axis that is left free at its ends."""


@dataclass(frozen=True)
class Tick:
    """A label of an axis. ``at``: its place in pixels."""

    at: float
    text: str


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


def drawn(chart: Chart, *, standalone: bool = False) -> str:
    """The SVG element. The chart needs at least one point. ``standalone``: with colours of its own, for a file."""
    points = [point for series in chart.series for point in series.points]
    across = _axis([p.x for p in points], _LEFT, chart.width - _RIGHT)
    up = _axis([p.y for p in points], chart.height - _BOTTOM, _TOP, log=chart.log)
    lines = []
    for series in chart.series:
        places = [(across.at(p.x), up.at(p.y), p) for p in series.points]
        lines.append((series, places, " ".join(f"{x},{y}" for x, y, _ in places)))
    return rendered(
        "chart.svg.j2", chart=chart, lines=lines, standalone=standalone, left=_LEFT, right=chart.width - _RIGHT,
        top=_TOP, bottom=chart.height - _BOTTOM, across=across.ticks(), up=up.ticks(), character=_CHARACTER,
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


def round_numbers(low: float, high: float) -> list[float]:
    """About five multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 5
    unit = 10 ** floor(log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [round(n * step, 10) for n in range(ceil(low / step), floor(high / step) + 1)]
