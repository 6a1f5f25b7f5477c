"""What must follow a cut in models of one architecture, found once on a small one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from ..checkpoints.shim import stock_config
from ..errors import UnsupportedModelError
from ..structure.coupling import LAYER
from .follow import Follower, Rule
from .verify import VERIFIED, verify

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..structure.architecture import Follows


def rules_of(config: PreTrainedConfig, kinds: Iterable[str]) -> tuple[Rule, ...]:
    """What must follow cuts of ``kinds`` in models of the architecture of ``config``, found on a small one.

    Raises `UnsupportedModelError` when a kind cannot be cut there in the end.
    """
    found: dict[Rule, None] = {}
    for verdict in verify(None, config, kinds=kinds):
        if verdict.verdict != VERIFIED:
            raise UnsupportedModelError(
                f"cutting {verdict.kind} units of a {config.model_type} model is {verdict.verdict}: {verdict.reason}"
            )
        found.update(dict.fromkeys(verdict.follows))
    return tuple(found)


def with_rules(family: Follows, model: PreTrainedModel, kinds: Collection[str]) -> Follows:
    """``family``; where it leaves to discovery what must follow a cut, the rules for cuts of ``kinds``, found once for
    many cuts."""
    if not getattr(family, "is_discovered", False):
        return family
    return Follower(rules_of(stock_config(model), set(kinds) - {LAYER}))
