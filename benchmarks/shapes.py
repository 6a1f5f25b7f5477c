"""Checkpoints of published shapes with random weights, written shard by shard, for measurements of memory and time.

    python -m benchmarks.shapes SHAPE DIRECTORY [DTYPE]

``DTYPE``: ``bfloat16`` or ``float32``. The tokenizer has a token for every byte.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerFast

from llmpruner.models.meta import meta_model


def _llama(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int = 32000) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
    }  # fmt: skip


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "7b": ("llama", _llama(4096, 11008, 32, 32, 32)),
    "13b": ("llama", _llama(5120, 13824, 40, 40, 40)),
    "3b": ("llama", _llama(3200, 8640, 26, 32, 32)),
    "1b": ("llama", _llama(2048, 8192, 16, 32, 8)),
    "wide": ("llama", _llama(1024, 4096, 12, 16, 8)),
    "tiny": ("llama", _llama(512, 1408, 8, 8, 4, vocabulary=8000)),
    "moe-7b": (
        "olmoe",
        {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_experts": 64}
        | {"num_experts_per_tok": 8, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50304},
    ),
}
"""Name → model type and what differs from its defaults."""

_SHARD = 2_000_000_000


def config_of(shape: str, dtype: str = "bfloat16") -> PreTrainedConfig:
    """The configuration of one of the `SHAPES`."""
    model_type, changes = SHAPES[shape]
    return CONFIG_MAPPING[model_type](**changes, dtype=dtype)


def write_tokenizer(directory: Path) -> None:
    """A tokenizer with a token for every byte, one for two spaces, and one for the ends of a text."""
    space = "\u0120"  # as byte-level tokenizers write a space
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), space * 2]
    # llama.cpp reads no byte-level vocabulary without merges.
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [(space, space)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(directory)


def write_random(config: PreTrainedConfig, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a checkpoint with weights of standard deviation 0.02, norms of one, in shards of at most 2 GB, one of which
    is in memory at a time. Experts are written one by one, as in published checkpoints."""
    directory.mkdir(parents=True)
    model = meta_model(config, dtype)
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}
    total = 0
    for parameter_name, parameter in model.named_parameters():
        for name, shape in _published(parameter_name, tuple(parameter.shape)):
            if len(shape) == 1:
                tensor = torch.ones(shape, dtype=dtype)
            else:
                tensor = torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=generator)
            if sum(t.nbytes for t in shard.values()) + tensor.nbytes > _SHARD:
                _save(shard, directory, files)
                shard = {}
            shard[name] = tensor
            total += tensor.nbytes
    _save(shard, directory, files)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)


def _save(shard: dict[str, torch.Tensor], directory: Path, files: dict[str, str]) -> None:
    """Write one shard; ``files``: tensor → the file that has it."""
    name = f"model-{len(set(files.values())):05}.safetensors"
    save_file(shard, directory / name, metadata={"format": "pt"})
    files.update(dict.fromkeys(shard, name))


def _published(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The names and shapes by which a parameter is published: stacked experts one by one."""
    path, _, leaf = name.rpartition(".")
    if leaf == "gate_up_proj" and len(shape) == 3:
        half = (shape[1] // 2, shape[2])
        return [(f"{path}.{n}.{part}.weight", half) for n in range(shape[0]) for part in ("gate_proj", "up_proj")]
    if leaf == "down_proj" and len(shape) == 3:
        return [(f"{path}.{n}.down_proj.weight", shape[1:]) for n in range(shape[0])]
    return [(name, shape)]


if __name__ == "__main__":
    shape, folder, dtype = [*sys.argv[1:], "bfloat16"][:3]
    write_random(config_of(shape, dtype), Path(folder), getattr(torch, dtype))
    write_tokenizer(Path(folder))
