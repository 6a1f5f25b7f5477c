"""The budget of key/value cache. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...errors import SelectionError
from ...structure.coupling import EXPERT, MLP
from .base import Budget, BudgetSubject
from .costs import Cost


class KvCache(Budget):
    """Bytes that the key/value cache grows by with every token, counted in the caches of the whole model and of models
    with units of each group removed. The same on every machine, so they are not recorded in plans."""

    name = "kv-cache"
    summary = "bytes of key/value cache per token"

    def check_kinds(self, kinds: Collection[str]) -> None:
        if kinds and set(kinds) <= {MLP, EXPERT}:
            raise SelectionError(
                f"{', '.join(kinds)} units save nothing of the KV cache per token; give --kinds attention, or layer"
            )

    def cost(self, subject: BudgetSubject, measured: Mapping[str, Any] | None) -> Cost:
        del measured
        from .cached_bytes import measure_cache

        return measure_cache(subject)
