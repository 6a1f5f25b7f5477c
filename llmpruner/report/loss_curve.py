"""The losses of a training as a drawing (SVG)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any

from .templates import rendered

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 16, 40
_MOST_POINTS = 400
"""Of a curve; of longer trainings, neighbouring steps are averaged."""


@dataclass(frozen=True)
class Tick:
    """A label of an axis. ``at``: its place in pixels."""

    at: float
    text: str


def loss_curve(training: Mapping[str, Any]) -> str:
    """An SVG element: loss over optimizer steps, and, where it was measured, the validation loss.

    ``training``: an element of ``recovery`` in ``llmpruner.json``, with at least one loss.
    """
    losses = [(step, float(loss)) for step, loss in enumerate(training["losses"], start=1)]
    checked = [(int(one["step"]), float(one["loss"])) for one in training.get("validation") or ()]
    shown = list(_averaged(losses))
    values = [loss for _, loss in (*shown, *checked)]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.5
    low, high, last = low - margin, high + margin, max(losses[-1][0], 2)

    def x(step: float) -> float:
        return _LEFT + (step / last) * (_WIDTH - _LEFT - _RIGHT)

    def y(loss: float) -> float:
        return _TOP + (high - loss) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def places(points: Sequence[tuple[float, float]]) -> list[tuple[str, str]]:
        return [(f"{x(step):.1f}", f"{y(loss):.1f}") for step, loss in points]

    return rendered(
        "loss_curve.svg.j2",
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=_WIDTH - _RIGHT,
        top=_TOP,
        bottom=_HEIGHT - _BOTTOM,
        losses=places(shown),
        checked=places(checked),
        best=None if training.get("best_step") is None else f"{x(training['best_step']):.1f}",
        across=[Tick(round(x(value), 1), f"{value:,.0f}") for value in round_numbers(0, last) if value == int(value)],
        up=[Tick(round(y(value), 1), f"{value:g}") for value in round_numbers(low, high)],
    )


def _averaged(losses: Sequence[tuple[int, float]]) -> Iterator[tuple[float, float]]:
    size = ceil(len(losses) / _MOST_POINTS)
    for first in range(0, len(losses), size):
        part = losses[first : first + size]
        yield sum(step for step, _ in part) / len(part), sum(loss for _, loss in part) / len(part)


def round_numbers(low: float, high: float) -> list[float]:
    """About five multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 5
    unit = 10 ** floor(log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [round(n * step, 10) for n in range(ceil(low / step), floor(high / step) + 1)]
