"""Weights of 16 bits that are in float32 while they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..models.numbers import autocast_to
from .base import RecoveryJob

_NARROW = (torch.bfloat16, torch.float16)
_PROBED = 8
"""Tokens with which computing is tried."""


@contextmanager
def in_float32(model: Any, job: RecoveryJob, *, wanted: bool = True) -> Iterator[RecoveryJob]:
    """A block in which the parameters of ``model`` that require gradients are in float32 where they have 16 bits: a
    step of a learning rate is mostly smaller than the distance of two numbers of bfloat16, and would be rounded away.
    After it they are rounded to their dtype. ``model``: that of ``job``, or a peft model around it.

    Gives the job with settings that compute in the dtype that the model had, where that was bfloat16: with
    ``autocast``. A model in float16, whose range autocast to bfloat16 would replace by less precision, and one with
    operators that refuse what autocast gives them, is in float32 as a whole. Without such parameters, or unless
    ``wanted``, model and job are as they were.
    """
    narrow = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad and p.dtype in _NARROW}
    if not wanted or not narrow:
        yield job
        return
    changed: dict[str, torch.dtype] = {}
    try:
        changed |= _widen(model, set(narrow))
        mixed = job.settings.autocast or (torch.float16 not in narrow.values() and _takes_autocast(model, job))
        if not mixed:
            changed |= _widen(model, None)
        yield replace(job, settings=job.settings.model_copy(update={"autocast": mixed}))
    finally:
        # By name, as the whole parameters of a model that was spread over processes are other objects.
        for name, parameter in model.named_parameters():
            if name in changed:
                parameter.grad = None
                parameter.data = parameter.data.to(changed[name])


def _widen(model: Any, names: set[str] | None) -> dict[str, torch.dtype]:
    """Parameters of 16 bits in float32, None: all. Returns their former dtypes."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype in _NARROW and (names is None or name in names):
            found[name] = parameter.dtype
            parameter.grad = None
            parameter.data = parameter.data.float()
    return found


def _takes_autocast(model: Any, job: RecoveryJob) -> bool:
    """Whether the model runs in bfloat16 under autocast, tried with a few tokens. DBRX adds bfloat16 to float32."""
    device = next(model.parameters()).device
    ids = torch.tensor([job.examples[0]["input_ids"][:_PROBED]], device=device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast_to(device.type, torch.bfloat16):
            model(input_ids=ids, use_cache=False)
    except RuntimeError:  # another cause raises again in the training
        return False
    finally:
        model.train(training)
    return True
