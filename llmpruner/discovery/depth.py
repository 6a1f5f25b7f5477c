"""Tensors outside the layers that have a part for every layer, as the per-layer embeddings of Gemma 3n and Gemma 4."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from ..models.meta import REFUSALS, meta_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def counts_layers(model: PreTrainedModel, layers: str) -> str | None:
    """The name of a parameter outside ``layers`` whose size depends on their number, which a cut of layers does not
    follow; None where there is none, or the class refuses to be built with a layer less.

    ``model``: without weights. ``layers``: the path of its decoder layers.
    """
    try:
        other = meta_model(_without_the_first(model.config))
    except (*REFUSALS, UnsupportedModelError):
        return None
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if not name.startswith(f"{layers}.") and shapes.get(name, tensor.shape) != tensor.shape:
            return str(name)
    return None


def _without_the_first(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of ``config`` without its first layer; the last one stays, as many configurations set its kind apart."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    count = text.num_hidden_layers
    values: dict[str, Any] = {
        name: value[1:] if isinstance(value, list) and len(value) == count else value
        for name, value in text.to_dict().items()
    }
    values["num_hidden_layers"] = count - 1
    if each := values.get("per_layer_config"):
        values["per_layer_config"] = {str(int(n) - 1): sizes for n, sizes in each.items() if int(n)}
    found = type(text).from_dict(values)
    if text is changed:
        return found
    for name, value in list(vars(changed).items()):
        if value is text:
            setattr(changed, name, found)
            return changed
    raise UnsupportedModelError(f"{type(config).__name__} does not hold its text configuration as an attribute")
