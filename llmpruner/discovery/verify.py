"""Verdicts of the oracle for every kind of unit: those that `discover --verify` shows, and what must follow a cut."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError
from ..models.meta import graph_of, meta_model
from ..models.save import stock_config
from ..models.stock import for_all_layers
from ..structure.coupling import ATTENTION, LAYER, CoupledGroup
from .follow import Follower, Rule
from .oracle import REFUSED, VERIFIED, Oracle, Verdict
from .tiny import HEADS, fingerprint, small_configs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..models.surgery import Follows
    from .family import ModelFamily

_VERDICTS: dict[tuple[object, str], Verdict] = {}
"""Verdicts of this process by architecture and kind: models of all sizes have the same small model."""


def verify(
    family: ModelFamily, config: PreTrainedConfig, *, kinds: Collection[str] | None = None, seed: int = 0
) -> list[Verdict]:
    """`check_kinds` on a small model of the architecture of ``config``; kinds that it lacks are refused. Raises
    `UnsupportedModelError` where no small model runs."""
    small, groups = representative(config, family, kinds)
    verdicts = check_kinds(family, small, groups, kinds=kinds, seed=seed)
    lacking = sorted(set(kinds or ()) - {verdict.kind for verdict in verdicts})
    return verdicts + [Verdict(kind, 0, 0, REFUSED, reason="a small model has no such units") for kind in lacking]


def check_kinds(
    family: ModelFamily,
    config: PreTrainedConfig,
    groups: Sequence[CoupledGroup] | None = None,
    *,
    kinds: Collection[str] | None = None,
    seed: int = 0,
) -> list[Verdict]:
    """A verdict for each of ``kinds`` (None: all) on a random model of ``config``. ``groups``: of it, if known."""
    graph = graph_of(meta_model(config), family.coupled_groups(config) if groups is None else groups)
    oracle = Oracle(config, graph, family, seed)
    return [oracle.judge(kind) for kind in graph.kinds if kinds is None or kind in kinds]


def representative(
    config: PreTrainedConfig, family: ModelFamily, kinds: Collection[str] | None = None
) -> tuple[PreTrainedConfig, Sequence[CoupledGroup]]:
    """A small configuration and its groups: the first that has all ``kinds`` (None: heads, if the model counts any), or
    else the most of them. Classes that spread heads over a fixed number of parts have none with another number of
    heads. Raises `UnsupportedModelError` when no small model can be traced."""
    text = for_all_layers(config.get_text_config())
    heads = {ATTENTION} if getattr(text, "num_attention_heads", None) else set()
    required = heads if kinds is None else set(kinds)
    incomplete: list[tuple[int, PreTrainedConfig, Sequence[CoupledGroup]]] = []
    failed: list[UnsupportedModelError] = []
    for small in islice(small_configs(config), len(HEADS)):
        try:
            groups = family.coupled_groups(small)
        except UnsupportedModelError as error:
            failed.append(error)
            continue
        missing = required - {group.kind for group in groups}
        if not missing:
            return small, groups
        incomplete.append((len(missing), small, groups))
    if not incomplete:
        raise failed[0]
    return min(incomplete, key=itemgetter(0))[1:]


def with_rules(family: ModelFamily, model: PreTrainedModel, kinds: Collection[str]) -> Follows:
    """``family``, or if it does not say what follows a cut, the rules that are found for cuts of ``kinds``."""
    if not family.is_discovered:
        return family
    return Follower(rules_of(stock_config(model), set(kinds) - {LAYER}, family))


def rules_of(config: PreTrainedConfig, kinds: Iterable[str], family: ModelFamily) -> tuple[Rule, ...]:
    """The rules for cuts of ``kinds``, found once in a process. `UnsupportedModelError` where one can't be cut."""
    kinds = sorted(set(kinds))
    architecture = type(family), *fingerprint(config)
    if missing := [kind for kind in kinds if (architecture, kind) not in _VERDICTS]:
        _VERDICTS.update({(architecture, v.kind): v for v in verify(family, config, kinds=missing)})
    rules: list[Rule] = []
    for kind in kinds:
        verdict = _VERDICTS[architecture, kind]
        if verdict.verdict != VERIFIED:
            raise UnsupportedModelError(
                f"cutting {kind} units of a {config.model_type} model is {verdict.verdict}: {verdict.reason}"
            )
        rules += verdict.follows
    return tuple(rules)
