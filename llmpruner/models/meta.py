"""Models without weights: parameters on the meta device, where they take no memory; and what their modules tell."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from ..errors import ModelError, UnsupportedModelError
from ..structure.coupling import ATTENTION, CoupledGroup, CouplingGraph, Role
from .messages import ALLOW, quiet_transformers


def register_model_class(config: PreTrainedConfig, revision: str | None = None) -> None:
    """Make sure that AutoModelForCausalLM has a class for ``config``. Raises `UnsupportedModelError` if there is none,
    and `ModelError` for code of a checkpoint, unless the user allowed it when ``config`` was read."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    reference = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if reference is None:
        model_type = f"model type '{config.model_type}' ({type(config).__name__})"
        raise UnsupportedModelError(f"there is no causal language model for {model_type}")
    if type(config).__module__.partition(".")[0] != TRANSFORMERS_DYNAMIC_MODULE_NAME:
        raise ModelError(f"the model class of '{config.name_or_path}' is code that the checkpoint brings; {ALLOW}")
    model_class = get_class_from_dynamic_module(reference, config.name_or_path, revision=revision)
    AutoModelForCausalLM.register(type(config), add_generation_mixin_to_remote_model(model_class), exist_ok=True)


def meta_model(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model of ``config`` with parameters on the meta device, and buffers with their values.
    ``dtype``: of the parameters; None: as ``config`` says. Raises as `register_model_class` and the constructor."""
    register_model_class(config)
    options = {} if dtype is None else {"dtype": dtype}
    return empty_model(partial(AutoModelForCausalLM.from_config, trust_remote_code=False, **options), config)


def empty_model(build: Callable[[PreTrainedConfig], PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """What ``build`` makes of ``config``, with parameters on the meta device and buffers with their values."""
    with init_empty_weights(include_buffers=False), quiet_transformers(), no_init_weights():
        model = build(copy.deepcopy(config))
    model.tie_weights()
    return model.eval()


def base_of(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of ``model``; where that is a pruned class, the dense class that it resizes."""
    return getattr(model, "pruned_base", type(model))


def graph_of(model: PreTrainedModel, groups: Iterable[CoupledGroup]) -> CouplingGraph:
    """The coupling graph of ``groups`` and the shapes of ``model``. Raises `CouplingError` where they contradict."""
    parameters, first = dict(model.named_parameters(remove_duplicate=False)), dict[int, str]()
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    ties = {name: tied for name, p in parameters.items() if (tied := first.setdefault(id(p), name)) != name}
    buffers = {name: tuple(buffer.shape) for name, buffer in model.named_buffers(remove_duplicate=False)}
    return CouplingGraph(tuple(groups), shapes, decoder_layers(model), ties, buffers=buffers)


def decoder_layers(model: Any) -> str:
    """Path of the list of as many modules as the configuration has layers, else of the longest. Raises for none."""
    # In a multimodal model, only inside the language model.
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = next((n for n, m in model.named_modules() if m is decoder), "")
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and [*m.parameters()]]
    if not lists:
        raise UnsupportedModelError(f"{type(model).__name__} has no list of decoder layers")
    # Some classes call their head the decoder.
    lists = [(n, m) for n, m in lists if n.startswith(inside)] or lists
    expected = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(n, m) for n, m in lists if len(m) == expected] or lists
    return str(max((len(m), -n.count("."), n) for n, m in lists)[2])


def macs_per_token(model: PreTrainedModel, graph: CouplingGraph, *, context: int = 512) -> int:
    """Multiply-accumulate operations to decode a token with ``context`` tokens in the cache: one per weight that it is
    multiplied by, and in attention ``context`` per channel, for the scores and for the values."""
    weights = sum(p.numel() if routed is None else p.numel() // len(p) * routed for _, p, routed in multiplied(model))
    reads = ((span, group) for group in graph.of_kinds([ATTENTION]) for span in group.spans_with(Role.CONSUMES))
    return weights + 2 * context * sum(span.index.width * group.units for span, group in reads)


def multiplied(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter, int | None]]:
    """(name, parameter, number of routed experts if stacked) of all parameters that tokens are multiplied by."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            stacked = parameter.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd)
            routed = getattr(model.config.get_text_config(), "num_experts_per_tok", len(parameter)) if stacked else None
            if parameter.ndim >= 2:
                yield f"{path}.{leaf}".removeprefix("."), parameter, routed
