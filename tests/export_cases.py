"""What exporters are given: tiny models, and the plans by which they were cut."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from checkpoint_cases import LLAMA, SIZES, cut_llama
from llmpruner_llama.family import LlamaFamily

from llmpruner import ModelFamily, build_graph
from llmpruner.discovery.family import AutoFamily
from llmpruner.models.surgery import cut


@dataclass(frozen=True)
class Source:
    """A loaded checkpoint, as `ExportTask.loaded` gives it."""

    model: Any
    family: ModelFamily
    config: Any
    plans: Sequence[Any] = ()
    record: Mapping[str, Any] | None = None
    tokenizer: Any | None = None

    def load(self) -> Source:
        return self


@dataclass(frozen=True)
class Other:
    """A model type with groups that are discovered. ``kept``: by successive plans. ``refused``: part of the message
    where zeros cannot pad it."""

    kept: Sequence[Mapping[str, Sequence[int]]]
    options: Mapping[str, Any] = field(default_factory=dict)
    refused: str | None = None


OTHERS: dict[str, tuple[str, Other]] = {
    "biases": ("qwen2", Other([{"layers.0.attention": [1], "layers.1.mlp": range(17)}])),
    "two plans and a layer less": (
        "qwen2",
        Other(
            [
                {"layers": [0, 2], "layers.2.mlp": range(4, 40)},
                {"layers.0.mlp": range(3, 9), "layers.1.mlp": range(8)},
            ]
        ),
    ),
    "packed gate and up": ("phi3", Other([{"layers.1.attention": [0], "layers.0.mlp": range(9)}], {"head_dim": None})),
    "a projection for query, key and value": (
        "gpt_neox",
        Other(
            [{"layers.1.attention": [0, 2, 3], "layers.0.mlp": range(9)}],
            {"head_dim": None, "num_key_value_heads": 4},
        ),
    ),
    # The slopes of ALiBi depend on which heads they are: zeros must take the places of the heads that were removed.
    "positions by head": ("bloom", Other([{"layers.0.attention": [0, 2, 3], "layers.2.attention": [1, 2]}])),
    "widths of experts": ("mixtral", Other([{"layers.0.mlp": range(16)}], {"num_local_experts": 3})),
    "experts": (
        "mixtral", Other([{"layers.0.experts": [0, 2]}], {"num_local_experts": 3}, "a router chooses among experts")
    ),
    "a norm over all heads": ("olmo2", Other([{"layers.1.attention": [0]}], refused="has a norm over all its units")),
}  # fmt: skip


def llama_source(name: str, dtype: torch.dtype = torch.float32) -> Source:
    """One of `checkpoint_cases.LLAMA`."""
    from transformers import LlamaConfig

    case = LLAMA[name]
    plans = [SimpleNamespace(kept=dict(case.kept))] if case.kept else []
    return Source(cut_llama(name, dtype), LlamaFamily(), LlamaConfig(**{**SIZES, **case.options}), plans, {})


def other_source(name: str) -> Source:
    """One of `OTHERS`, cut by the rules that are discovered for it."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    model_type, case = OTHERS[name]
    options = {key: value for key, value in {**SIZES, **case.options}.items() if value is not None}
    config = CONFIG_MAPPING[model_type](**options)
    dense = copy.deepcopy(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    family = AutoFamily()
    graph = build_graph(family, config)
    for kept in case.kept:
        graph = cut(model, graph, kept, family)
    return Source(model, family, dense, [SimpleNamespace(kept=dict(kept)) for kept in case.kept], {})


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found
