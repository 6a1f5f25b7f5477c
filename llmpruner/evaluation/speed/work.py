"""What a step of a model costs, from its sizes: what its speed could be. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Work:
    """Sizes of one model.

    ``body_macs``: multiply-accumulate operations per token of all weights but the head's. ``head_macs``: of the head
    per predicted token. ``pair_macs``: of attention for each token that a token reads. ``weight_bytes``: bytes of the
    weights that every step reads, the head included and the embedding not. ``routed_bytes``: share of experts that a
    token is routed to → bytes of all experts. ``cache_bytes``: of the key/value cache per token; None where they are
    not known.
    """

    body_macs: int
    head_macs: int
    pair_macs: int
    weight_bytes: int
    routed_bytes: Mapping[float, int] = field(default_factory=dict)
    cache_bytes: int | None = None

    def prefill(self, tokens: int) -> int:
        """Multiply-accumulate operations to process a sequence of ``tokens`` and to predict one more."""
        return self.body_macs * tokens + self.head_macs + self.pair_macs * tokens * (tokens + 1) // 2

    def decode(self, batch: int, context: float) -> float | None:
        """Bytes that a step for ``batch`` sequences of ``context`` tokens reads: weights once, of experts those that a
        sequence is routed to (if they are drawn evenly), and the cache of every sequence. None where the cache is not
        known."""
        if self.cache_bytes is None:
            return None
        experts = sum(size * (1 - (1 - share) ** batch) for share, size in self.routed_bytes.items())
        return self.weight_bytes + experts + batch * context * self.cache_bytes
