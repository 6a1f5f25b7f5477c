"""Measured latencies, as a plan records them."""

from __future__ import annotations

from ..structure.plan import Frozen, Units


class Timing(Frozen):
    """How long decoder layers of one shape take for one token, or everything outside of the layers.

    ``layers``: numbers of the layers that this holds for; none for what is outside. ``ms``: milliseconds per token
    while nothing is cut. ``groups``: name of a group, without its layer → (units kept, ms), from most units to fewest.
    """

    layers: Units
    ms: float
    groups: dict[str, tuple[tuple[int, float], ...]] = {}


class LatencyTable(Frozen):
    """Times to decode one token at a time while ``context`` tokens are in the cache, and where they were measured."""

    device: str
    dtype: str
    context: int
    timings: tuple[Timing, ...]
