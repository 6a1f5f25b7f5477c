"""A small model of the same architecture: its configuration with smaller numbers, by what each of them means."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from transformers import AutoModelForCausalLM

from ..errors import UnsupportedModelError, first_line
from ..models.messages import quiet_transformers, where
from ..models.meta import register_model_class
from .shrink import Around, Small, shrink

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

HEADS = (5, 3), (4, 2)
"""Numbers of heads, and of key/value heads where these are fewer, in the order of trials: odd ones first, because no
other size is a multiple of them; some classes accept even ones only."""
ATTEMPTS = tuple(Small(heads, complete, each) for each in (1, 2) for complete in (False, True) for heads in HEADS)
"""What is tried until a small model runs; two layers of every kind where layers share weights."""


def tiny_config(config: PreTrainedConfig, small: Small = ATTEMPTS[0]) -> PreTrainedConfig:
    """A configuration of the same class with few narrow layers. Raises `UnsupportedModelError` where the class refuses
    the small numbers."""
    register_model_class(config)  # the small configuration has lost the reference to the code of its class
    try:
        return cast("PreTrainedConfig", type(config).from_dict(shrink(config, small, Around())))
    except Exception as error:  # third-party constructors raise anything
        reason = " ".join(str(error).split())[:240]
        raise UnsupportedModelError(f"a {config.model_type} configuration refuses small numbers: {reason}") from error


def small_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The first of `small_configs`. Raises `UnsupportedModelError` as they do."""
    return next(small_configs(config))


def small_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Every `tiny_config` of `ATTEMPTS` whose model runs. Raises the first `UnsupportedModelError` if none does."""
    reasons: list[UnsupportedModelError] = []
    for attempt in ATTEMPTS:
        try:
            small = tiny_config(config, attempt)
            _run(random_instance(small))
        except UnsupportedModelError as error:
            reasons.append(error)
        else:
            yield small
    if len(reasons) == len(ATTEMPTS):
        raise reasons[0]


def fingerprint(config: PreTrainedConfig) -> tuple[object, ...]:
    """A key that is equal for configurations with equal small models."""
    texts = []
    for attempt in ATTEMPTS:
        try:
            texts.append(tiny_config(config, attempt).to_json_string(use_diff=False))
        except UnsupportedModelError as error:
            texts.append(str(error))
    return type(config), *texts


def _run(model: PreTrainedModel) -> None:
    try:
        with torch.no_grad():
            model(input_ids=torch.arange(7)[None], use_cache=False)
    except Exception as error:
        statement, inside = where(error)
        at = f", as `{statement}` in {inside} stops" if inside else ""
        raise UnsupportedModelError(
            f"a small {model.config.model_type} cannot run{at}: {first_line(error)[:160]}"
        ) from error


def random_instance(config: PreTrainedConfig, seed: int = 0, attention: str = "eager") -> PreTrainedModel:
    """A float32 model on the CPU with random weights that make every error visible: no parameter is constant, biases
    and norms included, nor is any saved buffer (the selection bias of experts)."""
    config = copy.deepcopy(config)
    generator = torch.Generator().manual_seed(seed)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=False
            )
        except Exception as error:
            raise UnsupportedModelError(
                f"a small {config.model_type} cannot be built: {first_line(error)[:160]}"
            ) from error
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (1.3 / math.sqrt(parameter.shape[-1])))
            else:
                parameter.add_(0.3 * noise)
        saved = model.state_dict(keep_vars=True).keys()
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point() and buffer.numel() > 1 and len(buffer.unique()) == 1:
                # Positive values (variances) stay positive.
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator).abs())
    return cast("PreTrainedModel", model.eval())
