"""Cutting a model, with the attributes and tables that must follow, which a family states or the oracle finds."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError
from ..models.save import stock_config
from ..models.surgery import cut_tensors
from ..structure.coupling import LAYER, CouplingGraph
from ..structure.kept import Kept
from .follow import Rule, apply_rules
from .oracle import VERIFIED, Verdict
from .tiny import fingerprint
from .verify import verify

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..models.family import ModelFamily

_VERDICTS: dict[tuple[object, str], Verdict] = {}
"""Verdicts of this process by architecture and kind: models of all sizes have the same small model."""


def cut(model: PreTrainedModel, graph: CouplingGraph, kept: Kept, family: ModelFamily) -> CouplingGraph:
    """`cut_tensors`, and update the attributes that must follow, in place; returns the graph of the cut model. Raises
    `UnsupportedModelError` for kinds of units that cannot be cut exactly, `PlanError` for invalid ``kept``."""
    remaining = cut_tensors(model, graph, kept)
    if family.refresh(model) is NotImplemented:
        kinds = {graph.by_name[name].kind for name in kept} - {LAYER}
        apply_rules(rules_of(stock_config(model), kinds, family), model, graph, kept)
    return remaining


def cut_copy(model: PreTrainedModel, graph: CouplingGraph, kept: Kept, family: ModelFamily) -> PreTrainedModel:
    """A copy of ``model`` cut to ``kept``, which shares the weights that are not cut."""
    copied = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    cut(copied, graph, kept, family)
    return copied


def rules_of(config: PreTrainedConfig, kinds: Iterable[str], family: ModelFamily) -> tuple[Rule, ...]:
    """The rules for cuts of ``kinds``, found once in a process. `UnsupportedModelError` where one can't be cut."""
    kinds = sorted(set(kinds))
    architecture = type(family), *fingerprint(config)
    if missing := [kind for kind in kinds if (architecture, kind) not in _VERDICTS]:
        _VERDICTS.update({(architecture, v.kind): v for v in verify(family, config, kinds=missing)})
    rules: list[Rule] = []
    for kind in kinds:
        verdict, what = _VERDICTS[architecture, kind], f"cutting {kind} units of a {config.model_type} model"
        if verdict.verdict != VERIFIED:
            raise UnsupportedModelError(f"{what} is {verdict.verdict}: {verdict.reason}")
        rules += verdict.follows
    return tuple(rules)
