"""Charts of points and lines as SVG elements, in the colours of the page. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from .base import rendered

_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 20, 16, 44
_ROOM = 0.06  # share of the range of an axis that is left free at its ends


@dataclass(frozen=True)
class Point:
    """``note``: what a pointer over it, or a screen reader, gives; ``label``: written next to it. ``ring``: marked."""

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


def drawn(
    what: str, x: str, y: str, series: Sequence[Series], *, log: bool = False, width: int = 640, height: int
) -> str:
    """The SVG element. ``what``: a description for screen readers; ``x``, ``y``: titles of the axes; ``series`` need at
    least one point. ``log``: the axis upwards is logarithmic; all values must be above zero then."""
    points = [point for line in series for point in line.points]
    across = _Axis([p.x for p in points], _LEFT, width - _RIGHT)
    up = _Axis([p.y for p in points], height - _BOTTOM, _TOP, log=log)
    lines = [(line, [(across.at(p.x), up.at(p.y), p) for p in line.points]) for line in series]
    return rendered(
        "chart.svg.j2", what=what, x=x, y=y, lines=lines, across=across.ticks(), up=up.ticks(),
        width=width, height=height, left=_LEFT, right=width - _RIGHT, top=_TOP, bottom=height - _BOTTOM,
    )  # fmt: skip


class _Axis:
    """From values to pixels between ``start`` and ``end``."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool = False) -> None:
        self.start, self.end, self.log = start, end, log
        low, high = min(values), max(values)
        room = _ROOM * (high - low) or abs(high) * _ROOM or 1.0
        self.low, self.high = (low / 1.2, high * 1.2) if log else (low - room, high + room)

    def at(self, value: float) -> float:
        low, high, value = (log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Place and text of about five labels; a logarithmic axis has 1, 2 and 5 times the powers of ten."""
        if self.log:
            powers = range(floor(log10(self.low)), ceil(log10(self.high)))
            values = [round(factor * 10.0**n, 12) for n in powers for factor in (1, 2, 5)]
        else:
            rough = (self.high - self.low) / 5
            unit = 10 ** floor(log10(rough))
            step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
            values = [round(n * step, 10) for n in range(ceil(self.low / step), floor(self.high / step) + 1)]
        return [(self.at(value), f"{value:,.10g}") for value in values if self.low <= value <= self.high]
