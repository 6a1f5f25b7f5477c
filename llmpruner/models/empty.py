"""Models without weights: parameters on the meta device, where they take no memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from .quiet import quiet_transformers
from .remote import register_model_class

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


REFUSALS = (
    *(ValueError, TypeError, RuntimeError, ArithmeticError, AssertionError, LookupError, AttributeError),
    StrictDataclassError,
)
"""The exceptions of configurations and constructors that refuse sizes."""


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
    with init_empty_weights(include_buffers=False), quiet_transformers(), _WithoutDrawing():
        model = build(copy.deepcopy(config))
    model.tie_weights()
    return model.eval()


_DRAWING = (
    "normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_",
)  # fmt: skip
"""Names of the functions that fill a tensor with random numbers."""


class _WithoutDrawing(TorchFunctionMode):
    """Leaves out random numbers for tensors on the meta device. They have no values, but the operators run all the
    same, in Python, which took three quarters of the time of building a model. Tensors elsewhere (buffers) are filled.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Compared by name: transformers puts functions of its own into `torch.nn.init` while it initialises a model.
        if getattr(func, "__name__", "") in _DRAWING:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)
