"""The curves of ``llmpruner sensitivity`` as a drawing (SVG)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from typing import Any

from ..pruning.allocation.curve import Curve, GroupCurve
from .base import rendered

_PANEL, _HEIGHT = 460, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 32, 44
_LOWEST = 1e-9
"""Divergences below this, which rounding alone gives, are drawn at it."""


def sensitivity_plot(curve: Curve) -> str:
    """An SVG element with a panel for each kind: divergence (logarithmic) over the share of units that was removed, a
    line for each group, from the first layer (blue) to the last (red)."""
    kinds = list(dict.fromkeys(group.kind for group in curve.groups))
    values = [max(point.divergence, _LOWEST) for group in curve.groups for point in group.points]
    low, high = floor(log10(min(values))), ceil(log10(max(values)))
    high = max(high, low + 1)
    # At most eight labels on the axis of divergences.
    every = max(1, ceil((high - low) / 8))
    scale = _Scale(low, high)
    return rendered(
        "sensitivity.svg.j2",
        width=_PANEL * len(kinds), height=_HEIGHT,
        left=_LEFT, right=_PANEL - _RIGHT, top=_TOP, bottom=_HEIGHT - _BOTTOM,
        panels=[_panel(n, k, [g for g in curve.groups if g.kind == k], scale) for n, k in enumerate(kinds)],
        up=[(f"{scale.y(10.0**power):.1f}", f"{10.0**power:g}") for power in range(low, high + 1, every)],
        across=[(f"{scale.x(share):.1f}", f"{share:.0%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)],
    )  # fmt: skip


class _Scale:
    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    def x(self, share: float) -> float:
        return _LEFT + share * (_PANEL - _LEFT - _RIGHT)

    def y(self, divergence: float) -> float:
        share = (self.high - log10(max(divergence, _LOWEST))) / (self.high - self.low)
        return _TOP + share * (_HEIGHT - _TOP - _BOTTOM)


def _panel(number: int, kind: str, groups: Sequence[GroupCurve], scale: _Scale) -> Mapping[str, Any]:
    lines = []
    for place, group in enumerate(groups):
        depth = place / max(len(groups) - 1, 1)
        points = [
            (f"{scale.x(point.removed / group.units):.1f}", f"{scale.y(point.divergence):.1f}")
            for point in group.points
        ]
        lines.append({"name": group.name, "color": f"hsl({210 + 150 * depth:.0f} 65% 45%)", "points": points})
    return {"offset": number * _PANEL, "kind": kind, "lines": lines}
