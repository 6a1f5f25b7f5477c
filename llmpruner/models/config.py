"""Configurations: as JSON in ``llmpruner.json``, and sizes of single layers (``per_layer_config``)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from math import inf, isfinite, isnan, nan
from typing import Any

from transformers import PreTrainedConfig

_TAG = "__float__"
_NUMBERS = {"Infinity": inf, "-Infinity": -inf, "NaN": nan}


def stated(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of ``config``, all of them JSON. Without those of a quantization, as the weights are not stored so."""
    values = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    return {name: _mapped(value, _tagged) for name, value in values.items()}


def values_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the configuration in a record."""
    return {name: _mapped(value, _untagged) for name, value in record["base_config"].items()}


def _tagged(value: Any) -> Any:
    if not isinstance(value, float) or isfinite(value):
        return value
    return {_TAG: "NaN" if isnan(value) else "Infinity" if value > 0 else "-Infinity"}


def _untagged(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {_TAG} and isinstance(value[_TAG], str):
        return _NUMBERS.get(value[_TAG], value)
    return value


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` applied to it, or else to what it contains."""
    changed = change(value)
    if changed is not value:
        return changed
    if isinstance(value, dict):
        return {name: _mapped(item, change) for name, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list | tuple) else value


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
