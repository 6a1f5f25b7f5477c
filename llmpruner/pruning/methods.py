"""Method: a named set of settings for pruning; and the built-in ones. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component
from ..structure.coupling import EXPERT, LAYER, VOCABULARY

if TYPE_CHECKING:
    from ..settings import PruneSettings


class Method(Component):
    """Provides defaults for settings that the user does not give."""

    kind: ClassVar[str] = "method"
    hook: ClassVar[str] = "llmpruner_methods"

    def defaults(self, asked: PruneSettings, *, writes: bool) -> Mapping[str, Any]:
        """Field of `PruneSettings` → value, for fields that the user does not set, but for the amount. ``asked``: the
        user's settings. ``writes``: whether the model writes the calibration text, which takes longer than reading it.
        ``compensate``, ``samples`` and ``length`` are by default as in LLM-Pruner; ``importance`` has no default."""
        raise NotImplementedError


class Best(Method):
    """Fisher importance on 12,288 tokens, then a least-squares fit of the weights that consumed removed units, on
    65,536 tokens (49,152 where the model generates them, which takes longer than reading; two thirds for a model of
    250M decoder parameters or more). For layers alone, the angular distance between their inputs and outputs, which
    predicts the loss better than weights do; for experts alone, the mean square of what they add (`energy`); for
    tokens, their use, and nothing to fit."""

    name = "best"
    summary = "units chosen by gradients, then the weights that consumed removed units are refitted (the default)"

    def defaults(self, asked: PruneSettings, *, writes: bool) -> Mapping[str, Any]:
        return {
            "importance": _criterion(asked, "fisher"),
            "compensate": "none" if asked.kinds == (VOCABULARY,) else "refit",
            "samples": 96 if writes else 128,
            "length": 512,
        }


class Fast(Method):
    """The mean square of what units add (`energy`) on 8,192 tokens, without compensation. For layers as `Best`."""

    name = "fast"
    summary = "units chosen by one forward pass over a few thousand tokens; no compensation"

    def defaults(self, asked: PruneSettings, *, writes: bool) -> Mapping[str, Any]:
        return {"importance": _criterion(asked, "energy"), "compensate": "none", "samples": 64, "length": 128}


class LlmPruner(Method):
    """LLM-Pruner (Ma et al., 2023): Taylor importance per weight on ten samples, the first and last layers whole."""

    name = "llm-pruner"
    summary = "the paper's: first-order Taylor importance on ten samples; no compensation"

    def defaults(self, asked: PruneSettings, *, writes: bool) -> Mapping[str, Any]:
        taylor = {"settings": {"taylor": {"variant": "element1"}}} if asked.importance in (None, "taylor") else {}
        free = {} if asked.kinds == (LAYER,) else {"shape": "free"}
        return {"importance": "taylor", **taylor, **TEN_SAMPLES, **free}


TEN_SAMPLES: Mapping[str, Any] = {"compensate": "none", "samples": 10, "length": 64}
"""The defaults for ``--importance`` without ``--method``: as in LLM-Pruner."""


def _criterion(asked: PruneSettings, of_units: str) -> str:
    """The criterion for layers, tokens or experts alone (on these, `Fisher` was not measured), else ``of_units``."""
    special: dict[tuple[str, ...], str] = {(LAYER,): "angular", (VOCABULARY,): "vocabulary", (EXPERT,): "energy"}
    return special.get(asked.kinds, of_units)
