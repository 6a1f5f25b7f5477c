"""The built-in methods. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..structure.coupling import LAYER
from .base import Method

if TYPE_CHECKING:
    from ..settings import PruneSettings


class Best(Method):
    """Output energy of the weights that read units, on 163,840 tokens (131,072 where the model writes them, which takes
    longer than reading), then a least-squares fit of these weights. Where nothing but whole layers may be removed, the
    angular distance between their inputs and outputs, which says more about a layer than its weights do."""

    name = "best"
    summary = "one forward pass chooses, then weights that read removed units are fitted again (the default)"

    def defaults(self, asked: PruneSettings, *, writes: bool) -> Mapping[str, Any]:
        return {
            "importance": _of_inputs(asked),
            "compensate": "refit",
            "samples": 256 if writes else 320,
            "length": 512,
        }


class Fast(Method):
    """The criteria of `Best` on 8,192 tokens, without compensation."""

    name = "fast"
    summary = "one forward pass over a few thousand tokens chooses; no compensation"

    def defaults(self, asked: PruneSettings, *, writes: bool) -> Mapping[str, Any]:
        del writes
        return {"importance": _of_inputs(asked), "compensate": "none", "samples": 64, "length": 128}


class LlmPruner(Method):
    """First-order Taylor importance per weight on ten samples, without compensation, as LLM-Pruner (Ma, Fang, Wang,
    2023) chooses what to remove; its recovery is `llmpruner recover`."""

    name = "llm-pruner"
    summary = "the paper's: first-order Taylor importance on ten samples; no compensation"

    def defaults(self, asked: PruneSettings, *, writes: bool) -> Mapping[str, Any]:
        del writes
        taylor = {"settings": {"taylor": {"variant": "element1"}}} if asked.importance in (None, "taylor") else {}
        return {"importance": "taylor", **taylor, **_TEN_SAMPLES}


class ByHand(Method):
    """What naming a criterion without a method means: that criterion on ten samples of 64 tokens, as in LLM-Pruner, and
    no compensation. Not registered, as it has no criterion of its own."""

    summary = "the criterion that is named, on ten samples; no compensation"

    def defaults(self, asked: PruneSettings, *, writes: bool) -> Mapping[str, Any]:
        del asked, writes
        return _TEN_SAMPLES


_TEN_SAMPLES: Mapping[str, Any] = {"compensate": "none", "samples": 10, "length": 64}


def _of_inputs(asked: PruneSettings) -> str:
    return "angular" if asked.kinds == (LAYER,) else "energy"
