"""LLaMAs of published shapes with random weights, written shard by shard, for measurements of memory and time.

    python -m benchmarks.shapes SHAPE DIRECTORY [DTYPE]

In bfloat16 by default. The tokenizer has a token for every byte.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from llmpruner.models.meta import meta_model

SHAPES = {
    "13b": (5120, 13824, 40, 40, 40, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "3b": (3200, 8640, 26, 32, 32, 32000),
    "1b": (2048, 8192, 16, 32, 8, 32000),
    "wide": (1024, 4096, 12, 16, 8, 32000),
    "small": (1024, 2816, 12, 16, 8, 8000),
    "tiny": (512, 1408, 8, 8, 4, 8000),
}
"""Name → hidden channels, MLP channels, layers, query heads, KV heads, tokens."""
_SHARD = 2_000_000_000


def write_model(shape: str, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a checkpoint with weights of standard deviation 0.02, norms of one, in shards of at most 2 GB, one of which
    is in memory at a time; and a tokenizer."""
    hidden, mlp, layers, heads, kv_heads, tokens = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=tokens, dtype=dtype, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}
    model = meta_model(config, dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            tensor = torch.ones(parameter.shape, dtype=dtype)
        else:
            tensor = torch.empty(parameter.shape, dtype=dtype).normal_(0, 0.02, generator=generator)
        if sum(t.nbytes for t in shard.values()) + tensor.nbytes > _SHARD:
            _save(shard, directory, files)
            shard = {}
        shard[name] = tensor
    _save(shard, directory, files)
    size = sum(parameter.nbytes for parameter in model.parameters())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(directory)
    _write_tokenizer(directory)


def _save(shard: dict[str, torch.Tensor], directory: Path, files: dict[str, str]) -> None:
    """Write one shard; ``files``: tensor → the file that has it."""
    name = f"model-{len(set(files.values())):05}.safetensors"
    save_file(shard, directory / name, metadata={"format": "pt"})
    files.update(dict.fromkeys(shard, name))


def _write_tokenizer(directory: Path) -> None:
    """A tokenizer with a token for every byte, one for two spaces, and one for the ends of a text."""
    space = "\u0120"  # as byte-level tokenizers write a space
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), space * 2]
    # llama.cpp reads no byte-level vocabulary without merges.
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [(space, space)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(directory)


if __name__ == "__main__":
    write_model(sys.argv[1], Path(sys.argv[2]), getattr(torch, (*sys.argv[3:], "bfloat16")[0]))
