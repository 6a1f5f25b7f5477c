"""The configuration of the dense model in ``llmpruner.json``.

JSON has no infinite numbers, which configurations of state-space layers contain (``time_step_limit``). They are stated
as transformers does in ``config.json``: ``{"__float__": "Infinity"}``.
"""

from __future__ import annotations

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
        return {name: _mapped(one, change) for name, one in value.items()}
    return [_mapped(one, change) for one in value] if isinstance(value, list | tuple) else value
