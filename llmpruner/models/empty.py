"""Models without weights, and transformers without chatter."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, cast

from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from .quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """An instance without weights: parameters on the meta device, small buffers (rotary tables) real."""
    with init_empty_weights(include_buffers=False), quiet_transformers():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    model.tie_weights()
    return cast("PreTrainedModel", model.eval())


def base_of(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of ``model``, or the one it resizes when it is a pruned model itself."""
    base: type[PreTrainedModel] = getattr(model, "pruned_base", type(model))
    return base


def empty_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """An instance of ``model_class`` with parameters on the meta device and real buffers."""
    with init_empty_weights(include_buffers=False), quiet_transformers():
        model = model_class(copy.deepcopy(config))
    model.tie_weights()
    return model.eval()
