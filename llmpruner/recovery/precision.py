"""The numbers that a training computes with, and those that it leaves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..models.numbers import autocast_to, computes_bfloat16_fast
from .base import RecoveryJob, Row
from .sharding import sharded

_NARROW = {torch.bfloat16, torch.float16}


@contextlib.contextmanager
def in_float32(model: Any, job: RecoveryJob) -> Iterator[tuple[Any, bool, Mapping[Any, torch.dtype]]]:
    """Keep trained parameters of 16 bits in float32: most steps at a low learning rate are smaller than the distance of
    two bfloat16 numbers, and would be rounded away. A model in float16 is in float32 as a whole, as bfloat16 would be
    less precise. Frozen weights in float16, to which adapters are added, stay so, and compute in bfloat16, as float16
    has no gradients as small as those of a mean over thousands of tokens.

    Yields the model to train, see `sharded`; whether to compute in bfloat16, under autocast, which some operators
    refuse (DBRX adds bfloat16 to float32); and the former dtypes, to which parameters are rounded at the end."""
    narrow = {p.dtype for p in model.parameters() if p.requires_grad} & _NARROW
    whole, half = torch.float16 in narrow, job.model.dtype == torch.float16
    widened = {p: p.dtype for p in model.parameters() if p.dtype in _NARROW and (p.requires_grad or whole)}
    with _in_place(model, job, widened) if job.shards_on is None else sharded(model, job, widened) as (trained, former):
        frozen = not narrow and (half or computes_bfloat16_fast(trained))
        autocast = frozen or narrow == {torch.bfloat16}
        yield trained, autocast and _runs_under_autocast(trained, job.examples[0]), former


@contextlib.contextmanager
def _in_place(
    model: Any, _: RecoveryJob, widened: Mapping[Any, torch.dtype]
) -> Iterator[tuple[Any, Mapping[Any, torch.dtype]]]:
    try:
        for parameter in widened:
            parameter.data = parameter.data.float()
        yield model, widened
    finally:
        for parameter, dtype in widened.items():
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)


def _runs_under_autocast(model: Any, row: Row) -> bool:
    ids = torch.tensor([row["input_ids"][:8]], device=model.device)
    try:
        with torch.no_grad(), autocast_to(model.device.type, torch.bfloat16, caches=False):
            model(input_ids=ids, use_cache=False)
    except RuntimeError:  # another cause raises again in the training
        return False
    return True


@contextlib.contextmanager
def as_saved(model: Any, widened: Mapping[Any, torch.dtype]) -> Iterator[None]:
    """Compute with the weights as they will be saved: rounded to their dtype, and adapters merged into weights of 16
    bits, each while its layer computes, as a second copy of all may not fit into memory."""
    exact = {parameter: parameter.detach().clone() for parameter in widened}
    unmerged: dict[Any, torch.Tensor] = {}

    def merge(layer: Any, _: Any) -> None:
        weight = layer.get_base_layer().weight
        unmerged[layer] = weight.data
        weight.data = weight.data.clone()
        with torch.autocast(weight.device.type, enabled=False):
            layer.merge()

    def restore(layer: Any, *_: Any) -> None:
        layer.merged_adapters.clear()
        layer.get_base_layer().weight.data = unmerged.pop(layer)

    adapted = [layer for layer in model.modules() if hasattr(layer, "merged_adapters")]
    narrow = [layer for layer in adapted if layer.get_base_layer().weight.dtype in _NARROW]
    hooks = [layer.register_forward_pre_hook(merge) for layer in narrow]
    hooks += [layer.register_forward_hook(restore) for layer in narrow]
    try:
        for parameter, dtype in widened.items():
            parameter.detach().copy_(exact[parameter].to(dtype))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, data in exact.items():
            parameter.detach().copy_(data)
