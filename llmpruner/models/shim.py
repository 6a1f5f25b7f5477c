"""The record of how a cut model differs from the model of its stored configuration, found by comparing the two."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import transformers
from torch import nn

from ..errors import CheckpointError
from .meta import base_of, empty_model
from .modeling_llmpruner import (
    LAYERS,
    RECORD_VERSION,
    apply_record,
    derive_lists,
    layer_overrides,
    pruned_model,
)
from .stock import LayerSizes, is_same_by_type, merged, plain_attributes, tensor_shapes, uncut_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_NUMBERS = (int, float, bool)
_PLAIN = (*_NUMBERS, str, type(None))


def shim_model(model: PreTrainedModel, config: PreTrainedConfig, sizes: LayerSizes) -> PreTrainedModel:
    """An instance, without weights, of the pruned class with the shapes and attributes of ``model``. ``config``: the
    stock configuration that ``model`` was cut from, less the removed layers. ``sizes``: `per_layer_sizes`."""
    base = base_of(model)
    record = {"version": RECORD_VERSION, "base": base.__name__, "module": _module_of(model), **derive(model, config)}
    pruned = pruned_model(base)
    values = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    own = layer_overrides(config)
    if own is not None:
        record["per_layer"] = own
    if sizes or own:
        stated = merged(own, sizes)
        values["per_layer_config"] = stated if own is None or is_same_by_type(config, stated) else own
        # Configurations check sizes of all layers when they are read, also by programs that want only the tokenizer.
        values["allow_global_per_layer_attribute_access"] = True
    stored = pruned.config_class.from_dict({**values, "llmpruner": record})
    stored._attn_implementation = config._attn_implementation
    return empty_model(pruned, stored)


def derive(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, Any]:
    """The record that turns an instance of ``config`` into ``model`` (see `modeling_llmpruner.apply_record`). Raises
    `CheckpointError` when one of the two has a parameter that the other lacks."""
    built = uncut_model(model, config)
    before, after = tensor_shapes(built), tensor_shapes(model)
    # A cut buffer is saved even where the class itself computes it.
    before |= {name: () for name, _ in built.named_buffers() if name not in before and name in after}
    for name in sorted(before.keys() ^ after.keys()):
        whose = "configuration" if name in before else "model"
        raise CheckpointError(f"only the {whose} has the parameter '{name}'; they must describe the same layers")
    shapes = {name: list(shape) for name, shape in after.items() if before[name] != shape}
    apply_record(built, {"shapes": shapes})
    record = {"layers": vars(model).get(LAYERS), "shapes": shapes, **_differences(model, built)}
    return {key: value for key, value in record.items() if value}


def _differences(model: nn.Module, built: nn.Module) -> dict[str, Any]:
    attributes: dict[str, dict[str, Any]] = {}
    configs: dict[str, dict[str, Any]] = {}
    modules = dict(built.named_modules())
    exchanged = [path for path, _ in model.named_modules() if path not in modules]
    for path, module in model.named_modules():
        if path not in modules:
            continue
        # A class that replaced modules while it ran will do so again: which mode it is in need not be stored.
        kinds = _NUMBERS if any(e.startswith(path and f"{path}.") for e in exchanged) else _PLAIN
        ours, theirs = plain_attributes(module, kinds), vars(modules[path])
        changed = {n: v for n, v in ours.items() if n in theirs and theirs[n] != v}
        changed |= {n: v for n, v in ours.items() if n not in theirs and v is not None}
        if changed:
            attributes[path] = changed
        own = vars(module).get("config")
        if own is not None and own is not vars(model).get("config"):
            stored = _plain_values(modules[path].config)
            changed = {n: v for n, v in _plain_values(own).items() if n in stored and stored[n] != v}
            if changed:
                configs[path] = changed
    return {"attributes": attributes, "configs": configs}


def _plain_values(config: Any) -> dict[str, Any]:
    return {n: v for n, v in vars(config).items() if not n.startswith("_") and isinstance(v, _NUMBERS)}


def _module_of(model: PreTrainedModel) -> str | None:
    """The module that defines the base class; None where transformers exports it."""
    base = base_of(model)
    if getattr(transformers, base.__name__, None) is base:
        return None
    # The module of a class that was loaded from a checkpoint's code is named as in the original installation.
    earlier: Mapping[str, Any] = getattr(model.config, "llmpruner", None) or {}
    return earlier.get("module") or base.__module__


def stock_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of ``model`` as an unquantised one of its base class, without records of cuts."""
    config = copy.deepcopy(model.config)
    derive_lists(config.get_text_config())
    if hasattr(model, "pruned_base"):
        dropped = {"model_type", "llmpruner", "auto_map", "per_layer_config", "allow_global_per_layer_attribute_access"}
        values = {k: v for k, v in config.to_dict().items() if k not in dropped}
        own = config.llmpruner.get("per_layer")
        if own is not None:
            values["per_layer_config"] = own
        config = model.pruned_base.config_class.from_dict(values)
        config._attn_implementation = model.config._attn_implementation
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
