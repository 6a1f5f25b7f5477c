"""Sharded training by torch's `fully_shard`: a process keeps its part of weights, gradients and moments of AdamW.

The whole weights of a layer are gathered while it computes, so that all processes must call the model equally often.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from .base import RecoveryJob

_FOLDER = "shards"  # of a checkpoint
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


@contextmanager
def sharded(
    model: Any, job: RecoveryJob, widened: Mapping[Any, torch.dtype]
) -> Iterator[tuple[Any, Mapping[Any, torch.dtype]]]:
    """A copy of ``model`` in shards on ``job.shards_on``, for ``model`` itself must stay an ordinary one; and
    ``widened``, parameters that are kept in float32 with their dtype before, of the copy. Meanwhile ``model`` is empty.
    At the end, unless by an exception, which may be that of one process, each process has the whole weights in it."""
    places = {name: (whole, whole.device, whole.dtype) for name, whole in model.named_parameters()}
    memo: dict[int, Any] = {id(whole): whole for whole in model.parameters()}
    twin = copy.deepcopy(model, memo)
    parts = [*job.model.get_submodule(job.graph.layers).children(), *_ends(job.model)]
    shard(twin, [memo[id(part)] for part in parts], job.shards_on, widened)
    yield twin, {twin.get_parameter(name): widened[whole] for name, (whole, *_) in places.items() if whole in widened}
    for name, (whole, device, dtype) in places.items():
        whole.data = twin.get_parameter(name).detach().full_tensor().to(device, dtype)


def _ends(model: Any) -> list[nn.Module]:
    """The embedding and the head, which may be as large as many layers."""
    return [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]


def shard(model: nn.Module, parts: Iterable[nn.Module], device: Any, widened: Collection[Any] = ()) -> None:
    """Replace all parameters by this process' shards on ``device``, part by part, and empty them. Those of ``parts``
    are gathered part by part, and what is outside or in several of them for a whole pass."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for part in [*parts, model]:
        inside = Counter(id(parameter) for _, parameter in part.named_parameters(remove_duplicate=False))
        if part is not model and any(count < uses[parameter] for parameter, count in inside.items()):
            continue
        wholes = [parameter for parameter in part.parameters() if not isinstance(parameter, DTensor)]
        for whole in wholes:
            if whole in widened:
                whole.data = whole.data.float()
        # Otherwise the root would keep its weights after a pass without gradients, and not see how they change.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
        for whole in wholes:
            whole.data = whole.data.new_empty(0)


def save_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the trained parameters and the state of the optimizer; each process writes its part."""
    state: dict[str, Any] = {"model": get_model_state_dict(model, options=_TRAINED)}
    if optimizer.state:  # torch makes one by a step
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_TRAINED)
    save(state, checkpoint_id=folder / _FOLDER)


def load_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Read what `save_shards` wrote; the state of ``optimizer`` unless it is None."""
    state: dict[str, Any] = {"model": get_model_state_dict(model, options=_TRAINED)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_TRAINED)
    load(state, checkpoint_id=folder / _FOLDER)
    set_model_state_dict(model, state["model"], options=_TRAINED)
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_TRAINED)
