"""Sizes of single layers in a configuration, by the convention of transformers (``per_layer_config``)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def for_all_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """``config``, or where layers differ by ``per_layer_config``, a copy of which the values for all layers can be
    read: transformers refuses to read them from a configuration with others."""
    if not config.is_heterogeneous:
        return config
    plain = copy.deepcopy(config)
    plain.per_layer_config = None
    return plain


def merged(
    overrides: Mapping[int, Mapping[str, Any]] | None, sizes: Mapping[int, Mapping[str, Any]]
) -> dict[int, dict[str, Any]]:
    """``per_layer_config`` with the ``overrides`` of a model and ``sizes`` after a cut, which replace them."""
    overrides = overrides or {}
    return {n: {**overrides.get(n, {}), **sizes.get(n, {})} for n in sorted(overrides.keys() | sizes.keys())}


def is_same_by_type(config: PreTrainedConfig, overrides: Mapping[int, Mapping[str, Any]]) -> bool:
    """Whether layers of one type have the same ``overrides``: classes whose layer types differ in size read the sizes
    of a type (for rotary tables), which transformers refuses where layers of a type differ."""
    types = getattr(config, "layer_types", None) or ()
    first: dict[str, Mapping[str, Any]] = {}
    return all(first.setdefault(kind, overrides.get(n, {})) == overrides.get(n, {}) for n, kind in enumerate(types))
