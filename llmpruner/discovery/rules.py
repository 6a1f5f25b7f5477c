"""The rules of `oracle.follow` for models of one architecture, found once on a small model."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, cast

from ..errors import UnsupportedModelError
from ..models.shim import stock_config
from ..structure.coupling import LAYER
from .follow import Follower, Rule
from .tiny import fingerprint
from .verify import VERIFIED, Verdict, verify

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..structure.architecture import Architecture, Follows

_FOUND: dict[tuple[object, str], Verdict] = {}
"""Verdicts of this process by architecture and kind. They hold for all sizes of one architecture, which are reduced to
the same small model."""


def rules_of(config: PreTrainedConfig, kinds: Iterable[str], family: Architecture | None = None) -> tuple[Rule, ...]:
    """The rules for cuts of ``kinds`` in models of the architecture of ``config``, found on a small model at most once
    in a process for each architecture and kind.

    ``family``: declares the groups; None: they are discovered. Raises `UnsupportedModelError` when a kind cannot be cut
    exactly, or the small model has no units of it.
    """
    wanted = sorted(set(kinds))
    architecture = type(family), *fingerprint(config)
    missing = [kind for kind in wanted if (architecture, kind) not in _FOUND]
    if missing:
        _FOUND.update({(architecture, v.kind): v for v in verify(family, config, kinds=missing)})
    found: dict[Rule, None] = {}
    for kind in wanted:
        verdict = _FOUND.get((architecture, kind))
        if verdict is None:
            raise UnsupportedModelError(
                f"what must follow a cut of {kind} units cannot be found: a small {config.model_type} model has none"
            )
        if verdict.verdict != VERIFIED:
            raise UnsupportedModelError(
                f"cutting {kind} units of a {config.model_type} model is {verdict.verdict}: {verdict.reason}"
            )
        found.update(dict.fromkeys(verdict.follows))
    return tuple(found)


def with_rules(family: Follows, model: PreTrainedModel, kinds: Collection[str]) -> Follows:
    """``family``, or if its rules are discovered, the rules for cuts of ``kinds``."""
    if not getattr(family, "is_discovered", False):
        return family
    return Follower(rules_of(stock_config(model), set(kinds) - {LAYER}, cast("Architecture", family)))
