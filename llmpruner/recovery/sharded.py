"""Models whose parameters are spread over processes (FSDP2, `torch.distributed.fsdp.fully_shard`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def whole_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """The values of a parameter, gathered where it is spread over processes, all of which must call this."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def make_whole(model: nn.Module) -> None:
    """Undo `fully_shard` in place: every process has plain parameters, and the modules their own classes. All
    processes must call this; a model that is not sharded stays as it is."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    modules: list[Any] = list(model.modules())
    for module in modules:
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(whole_tensor(parameter), parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
    for module in modules:
        if isinstance(module, FSDPModule):
            _forget(module)


def _forget(module: Any) -> None:
    state = module._get_fsdp_state()
    for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
        handle.remove()
    # `fully_shard` made a class of FSDPModule and the module's own.
    module.__class__ = type(module).__bases__[1]
