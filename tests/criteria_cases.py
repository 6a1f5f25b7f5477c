"""Tiny models with structure in their activations, for tests of criteria that run the model."""

import copy
from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from llmpruner import ModelFamily, load_catalog
from llmpruner.discovery.groups import build_graph
from llmpruner.discovery.opening import family_for
from llmpruner.discovery.tiny import random_instance
from llmpruner.engine.walk import CalibrationSet
from llmpruner.models.family import AutoFamily
from llmpruner.models.model import Model
from llmpruner.models.reference import Reference
from llmpruner.structure.coupling import CouplingGraph

SMALL = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GPT = {"vocab_size": 96, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 128, "n_inner": 56}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
FALCON = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "bias": False}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("llama", SMALL | {"num_key_value_heads": 6}),
    "llama-gqa": ("llama", SMALL),
    "gpt2": ("gpt2", GPT | TOKENS),
    "gptj": ("gptj", GPT | TOKENS | {"rotary_dim": 4}),
    "phi": ("phi", SMALL),
    "falcon": ("falcon", FALCON | TOKENS | {"num_kv_heads": 3, "new_decoder_architecture": True}),
    "falcon-7b": ("falcon", FALCON | TOKENS | {"multi_query": True, "new_decoder_architecture": False}),
    "granite": ("granite", SMALL | {"residual_multiplier": 0.4}),
    "gemma2": ("gemma2", SMALL | {"sliding_window": 16}),
    "mixtral": ("mixtral", SMALL | EXPERTS),
    "qwen2_moe": (
        "qwen2_moe",
        SMALL
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
        | {"shared_expert_intermediate_size": 24, "norm_topk_prob": False, "mlp_only_layers": []},
    ),
    "glm": ("glm", SMALL),
    "olmo2": ("olmo2", SMALL),
    "minimax_m2": ("minimax_m2", SMALL | EXPERTS),
    "gpt_oss": ("gpt_oss", SMALL | EXPERTS | {"sliding_window": 16}),
    "llama4": (
        "llama4_text",
        SMALL | EXPERTS | {"num_experts_per_tok": 1, "intermediate_size_mlp": 40, "attention_chunk_size": 32},
    ),
}


def tokens(samples: int = 24, length: int = 32, seed: int = 0, vocabulary: int = 96) -> CalibrationSet:
    """Sequences in which adjacent tokens depend on each other: a step of one to three from token to token."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(3, vocabulary, (samples, 1), generator=generator)
    steps = torch.randint(1, 4, (samples, length - 1), generator=generator)
    ids = torch.cat([start, start + steps.cumsum(1)], 1)
    return CalibrationSet(3 + (ids - 3) % (vocabulary - 3), "steps")


def make(name: str) -> Model:
    """The model ``name`` of `CASES`; its weights have rank 12, so that units are correlated and the rest can replace a
    cut one."""
    config, family, graph = _structure(name)
    model = copy.deepcopy(_instance(name))
    return Model(Reference("tiny"), copy.deepcopy(config), family, graph, network=model, tokenizer=None)


@cache
def _instance(name: str) -> PreTrainedModel:
    return correlated(random_instance(_structure(name)[0]))


def correlated(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with weights of rank 12 nearly."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                few = torch.randn(*parameter.shape[:-1], 12, generator=generator)
                few = few @ torch.randn(*parameter.shape[:-2], 12, parameter.shape[-1], generator=generator)
                scale = parameter.std() / few.std()
                parameter.mul_(0.3).add_(few, alpha=0.95 * float(scale))
    return model


@cache
def _structure(name: str) -> tuple[PreTrainedConfig, ModelFamily, CouplingGraph]:
    """Once in a process, as most of these structures are discovered."""
    model_type, changes = CASES[name]
    config = CONFIG_MAPPING[model_type](**changes)
    family = family_for(load_catalog(), config)
    return config, family, build_graph(family, config)


def opened(network: PreTrainedModel, family: ModelFamily | None = None) -> Model:
    """``network`` as `llmpruner.load` gives one, with the groups of ``family`` (default: as discovery finds them)."""
    config, family = copy.deepcopy(network.config), family or AutoFamily()
    return Model(Reference("tiny"), config, family, build_graph(family, config), network=network, tokenizer=None)


def layers_of(loaded: Model) -> Any:
    return loaded.network.get_submodule(loaded.graph.layers)


def experts_of(model: Any, layer: int | None = None) -> tuple[str, Any]:
    """Path and module of the experts of ``layer``, or of the first that has any."""
    named = ((path, module) for path, module in model.named_modules() if path.endswith(".experts"))
    return next((path, module) for path, module in named if layer is None or f".{layer}." in path)


def boundaries(loaded: Model, ids: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states before the first layer and after each, in a plain forward pass."""
    states: list[torch.Tensor] = []
    layers = layers_of(loaded)
    first = layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    rest = [
        layer.register_forward_hook(lambda _, __, out: states.append(out[0] if isinstance(out, (tuple, list)) else out))
        for layer in layers
    ]
    with torch.no_grad():
        loaded.network(input_ids=ids, use_cache=False)
    for handle in [first, *rest]:
        handle.remove()
    return states


def observed(model: Any, path: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and outputs of the module ``path``, (tokens, width), float64."""
    args, out = called(model, path, ids)
    return args[0].flatten(0, -2).double(), out.flatten(0, -2).double()


def called(model: Any, path: str, ids: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """What the module ``path`` is called with, and returns."""
    seen: list[Any] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, args, out: seen.append((args, out)))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    (call,) = seen
    return call
