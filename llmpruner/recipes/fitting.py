"""The first way of holding models that fits into ``--max-memory``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ..engine.boundaries import DEFAULT_LIMIT
from ..errors import SettingsError
from ..settings import RunSettings
from .forecast import Forecast, Residency, size_text


def boundary_limit(run: RunSettings) -> int:
    """Bytes of hidden states in memory where nothing limits them further."""
    del run
    return DEFAULT_LIMIT


def fitting(
    run: RunSettings,
    max_memory: int,
    forecast: Callable[[Residency], Forecast],
    *,
    streams: bool,
    divided: Sequence[int],
    what: str,
    detail: str,
    advice: str,
) -> Forecast:
    """The first forecast within ``max_memory`` of: in memory and, where that is possible (``streams``), layer by layer,
    each with the usual and with less memory for hidden states; then with micro-batches that are ``divided``.

    Raises `SettingsError` where none fits, with what the smallest takes. ``what`` needs it; ``detail``: why more ways
    are not possible; ``advice``: what would do beside a larger limit.
    """
    limit, fixed = boundary_limit(run), False
    tried = [forecast(way) for way in _ways(limit, fixed=fixed, streams=streams, divided=divided)]
    for one in tried:
        if one.memory <= max_memory:
            return one
        spare = max_memory - one.memory + one.residency.boundary_memory
        if not fixed and one.residency.divided == 1 and 0 < spare < limit:
            less = forecast(replace(one.residency, boundary_memory=spare))
            if less.memory <= max_memory:
                return less
    least = min(tried, key=lambda one: one.memory)
    unit = " (a number without a unit is of bytes: 4GiB, 500MB)" if max_memory < 2**20 else ""
    raise SettingsError(
        f"--max-memory {size_text(max_memory)}: {what} needs at least {size_text(least.memory)} "
        f"({size_text(least.base)} before it starts; {least.largest_parts}){detail}; raise it{unit}, or {advice}"
    )


def _ways(limit: int, *, fixed: bool, streams: bool, divided: Sequence[int]) -> Iterator[Residency]:
    for streamed in (False, True) if streams else (False,):
        yield Residency(streamed, limit)
        if not fixed:
            yield Residency(streamed, 0)
    for times in divided:
        yield Residency(streams, limit if fixed else 0, times)
