"""Models without weights: parameters on the meta device, where they take no memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from .quiet import quiet_transformers
from .remote import register_model_class

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


def meta_model(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model of ``config`` without weights: parameters on the meta device, buffers (rotary tables)
    with their values. ``dtype``: of the parameters; None: as ``config`` says.

    Raises `ModelError` when the class is code of a checkpoint that may not run, `UnsupportedModelError` when there is
    no class, and whatever the class's constructor raises.
    """
    register_model_class(config)
    options = {} if dtype is None else {"dtype": dtype}
    return _without_weights(partial(AutoModelForCausalLM.from_config, trust_remote_code=False, **options), config)


def base_of(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of ``model``; where that is a pruned class, the dense class that it resizes."""
    base: type[PreTrainedModel] = getattr(model, "pruned_base", type(model))
    return base


def empty_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """An instance of ``model_class`` with parameters on the meta device and buffers with their values."""
    return _without_weights(model_class, config)


def put_parameters(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Give ``model`` other parameters under the names of its own."""
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = parameter


def _without_weights(build: Callable[..., PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False), quiet_transformers():
        model = build(copy.deepcopy(config))
    model.tie_weights()
    return model.eval()
