"""Presets for ``--method``: complete ways to prune, each with the reason why it is offered.

A preset is only a set of defaults: every option that the user gives wins over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Method:
    """Defaults of ``plan`` and ``prune``. ``samples`` × ``length``: calibration tokens; ``written``: the same where the
    model writes them, which takes longer than reading; None: as many.
    ``of_layers``: the criterion where nothing but whole layers may go, whose weights say little about them; None: the
    same one."""

    name: str
    summary: str
    importance: str
    variant: str | None
    compensate: str
    samples: int
    length: int
    of_layers: str | None = None
    written: tuple[int, int] | None = None

    def amount(self, *, writes: bool) -> tuple[int, int]:
        """(samples, length)"""
        return self.written if writes and self.written else (self.samples, self.length)


BEST = Method(
    "best",
    "one forward pass chooses, then the weights that read cut units are fitted again (the default)",
    importance="energy",
    variant=None,
    compensate="refit",
    samples=320,
    length=512,
    of_layers="angular",
    written=(256, 512),
)
FAST = Method(
    "fast",
    "one forward pass over a few thousand tokens, no repair",
    importance="energy",
    variant=None,
    compensate="none",
    samples=64,
    length=128,
    of_layers="angular",
)
LLM_PRUNER = Method(
    "llm-pruner",
    "the paper's: first-order Taylor on ten samples, no repair",
    importance="taylor",
    variant="element1",
    compensate="none",
    samples=10,
    length=64,
)
BY_HAND = Method(
    "",
    "what naming a criterion without a method means: that criterion on ten samples, as in the paper, and no repair",
    importance="",
    variant=None,
    compensate="none",
    samples=10,
    length=64,
)
METHODS: Mapping[str, Method] = MappingProxyType({m.name: m for m in (BEST, FAST, LLM_PRUNER)})
