"""The budget of key/value cache. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any

from .base import Budget, BudgetSubject
from .costs import Cost


class CacheCost(Cost):
    """Bytes that the key/value cache grows by with every token.

    ``layers``: bytes of each decoder layer while nothing is cut. ``per_unit``: (group name, layer) → bytes of that
    layer that are saved with each unit of the group. ``units``: group name → its number of units.
    """

    label, unit = "KV cache per token", "bytes of KV cache per token"

    def __init__(
        self,
        layers: Sequence[int],
        per_unit: Mapping[tuple[str, int], Fraction],
        units: Mapping[str, int],
    ) -> None:
        self._layers, self._per_unit, self._units = layers, per_unit, units

    def remaining(self, kept: Mapping[str, int] | None = None, gone: Collection[int] = ()) -> int:
        kept = kept or {}
        lost = sum(
            rate * (self._units[name] - kept[name])
            for (name, layer), rate in self._per_unit.items()
            if name in kept and layer not in gone
        )
        return round(sum(size for layer, size in enumerate(self._layers) if layer not in gone) - lost)


class KvCache(Budget):
    """Bytes that the key/value cache grows by with every token, counted in the cache of the model itself: whole, and
    with units of each group removed. The same on every machine, so that nothing is recorded."""

    name = "kv-cache"
    summary = "bytes of key/value cache per token"

    def cost(self, subject: BudgetSubject, measured: Mapping[str, Any] | None) -> CacheCost:
        del measured
        from .cached_bytes import measure_cache

        return measure_cache(subject)
