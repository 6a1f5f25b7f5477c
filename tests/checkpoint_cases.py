"""Cut models for tests of checkpoints and exports: each way to cut a tiny LLaMA, and some other classes."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from llmpruner_llama import LlamaFamily

from llmpruner import ModelFamily, build_graph
from llmpruner.discovery.cut import cut
from llmpruner.models.family import AutoFamily
from llmpruner.models.surgery import cut_tensors

LAYERS = 3
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip
INPUT_IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8], [2, 7, 18, 28, 18, 28, 45, 9]])


@dataclass(frozen=True)
class Case:
    """``kept`` by group; ``model_class``: that the checkpoint must have, of a shim where its name begins with
    *Pruned*."""

    kept: Mapping[str, Sequence[int]]
    model_class: str
    options: Mapping[str, Any] = field(default_factory=dict)


def every_layer(kind: str, kept: Sequence[int]) -> dict[str, Sequence[int]]:
    return {f"layers.{n}.{kind}": kept for n in range(LAYERS)}


MHA = {"num_key_value_heads": 4}
TIED = {"tie_word_embeddings": True}
SHIM, STOCK, MISTRAL = "PrunedLlamaForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"

LLAMA = {
    "nothing": Case({}, STOCK),
    "mlp": Case({"layers.0.mlp": range(40), "layers.2.mlp": range(3, 20)}, SHIM),
    "mlp-tied": Case({"layers.1.mlp": range(7)}, SHIM, TIED),
    "mlp-uniform": Case(every_layer("mlp", range(5, 35)), STOCK, TIED),
    "mha": Case({"layers.1.attention": [1, 3], "layers.2.attention": [0, 1, 3]}, SHIM, MHA),
    "gqa": Case({"layers.0.attention": [1]}, SHIM),
    "mha-indivisible": Case(every_layer("attention", [0, 2, 3]), MISTRAL, MHA),
    "gqa-uniform": Case(every_layer("attention", [1]), STOCK),
    "query": Case({"layers.0.query": [1, 2], "layers.1.mlp": range(8)}, SHIM, TIED),
    "query-uniform": Case(every_layer("query", [0, 3]), STOCK),
    "hidden": Case({"hidden": range(4, 28)}, STOCK),
    "hidden-tied-indivisible": Case({"hidden": range(21)}, MISTRAL, TIED),
    "depth": Case({"layers": [0, 2]}, STOCK),
    "depth-mlp": Case({"layers": [0, 2], "layers.2.mlp": range(30)}, SHIM),
    "all-uniform": Case(
        {
            "hidden": range(24), "layers": [1, 2], **every_layer("mlp", range(30)),
            **every_layer("attention", [1, 2, 3]),
        }, STOCK, MHA,
    ),
    "all": Case(
        {"hidden": range(20), "layers": [1, 2], "layers.2.mlp": range(30), "layers.1.attention": [0]}, SHIM, TIED
    ),
}  # fmt: skip
UNEVEN = {"layers.1.attention": [0], "layers.0.mlp": range(9)}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}


def cut_llama(name: str, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    case = LLAMA[name]
    config = LlamaConfig(**{**SIZES, **case.options})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype).eval()
    cut(model, build_graph(LlamaFamily(), config), case.kept, LlamaFamily())
    return model


def _cut(
    prefix: str, kept: Mapping[str, Sequence[int]] = UNEVEN, *, without: Sequence[str] = (), **options: Any
) -> Any:
    """``without``: of `SIZES`."""
    import transformers

    sizes = {name: size for name, size in SIZES.items() if name not in without}
    config = getattr(transformers, f"{prefix}Config")(**sizes, **options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    cut_tensors(model, build_graph(AutoFamily(), config), kept)
    return model


def cut_phi3() -> Any:
    model = _cut("Phi3", without=("head_dim",))
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config.num_attention_heads, attention.config.num_key_value_heads = 2, 1
    attention.num_key_value_heads = 1
    return model


def cut_mixtral_uniform() -> Any:
    model = _cut("Mixtral", every_layer("experts", [0, 2]), **EXPERTS)
    for layer in model.model.layers:
        layer.mlp.experts.num_experts = layer.mlp.gate.num_experts = 2
    return model


EVERY: dict[str, tuple[Callable[[], Any], str]] = {
    **{name: (partial(cut_llama, name), case.model_class) for name, case in LLAMA.items()},
    "qwen2": (
        partial(
            _cut, "Qwen2", {"layers.0.attention": [1], "layers.1.mlp": range(17)}, layer_types=["full_attention"] * 3
        ),
        "PrunedQwen2ForCausalLM",
    ),
    "gemma2": (
        partial(_cut, "Gemma2", query_pre_attn_scalar=8, sliding_window=4, hidden_activation="gelu_pytorch_tanh"),
        "PrunedGemma2ForCausalLM",
    ),
    "glm": (partial(_cut, "Glm", attention_bias=False), "PrunedGlmForCausalLM"),
    "phi3": (cut_phi3, "PrunedPhi3ForCausalLM"),
    "gpt_neox": (
        partial(
            _cut, "GPTNeoX", UNEVEN | {"layers.1.attention": [0, 2, 3]}, without=("head_dim", "num_key_value_heads")
        ),
        "PrunedGPTNeoXForCausalLM",
    ),
    "mixtral": (
        partial(_cut, "Mixtral", {"layers.1.attention": [0], "layers.0.mlp": range(16)}, **EXPERTS),
        "PrunedMixtralForCausalLM",
    ),
    "mixtral-experts-uniform": (cut_mixtral_uniform, "MixtralForCausalLM"),
}
"""Cut model, and the class that its checkpoint must have."""


@dataclass(frozen=True)
class Source:
    """A loaded checkpoint, as `ExportTask.loaded` gives it."""

    network: Any
    family: ModelFamily
    config: Any
    plans: Sequence[Any] = ()
    record: Mapping[str, Any] | None = None
    tokenizer: Any | None = None

    def load(self) -> Any:
        return self


def llama_source(name: str, dtype: torch.dtype = torch.float32) -> Source:
    """One of `LLAMA`."""
    from transformers import LlamaConfig

    case = LLAMA[name]
    plans = [SimpleNamespace(kept=dict(case.kept))] if case.kept else []
    return Source(cut_llama(name, dtype), LlamaFamily(), LlamaConfig(**{**SIZES, **case.options}), plans, {})
