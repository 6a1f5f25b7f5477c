"""What the steps of a GGUF file cost in llama.cpp, from its metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType

from ..runtime import Work

_CACHE_ITEM = 2
"""Bytes of a number in the cache, which is float16 by default."""


def gguf_work(path: Path) -> tuple[Work, str]:
    """What the steps of a GGUF file of a decoder with heads cost, and the type of most of its weights.

    Every matrix is one that tokens are multiplied by, except for the embedding where the file has a head, too. Of
    stacked experts, a token is multiplied by those that it is routed to.
    """
    reader = GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())

    def listed(key: str, layers: int) -> list[int]:
        """A number for each layer."""
        field = reader.fields.get(f"{architecture}.{key}")
        value: Any = 0 if field is None else field.contents()
        return list(value) if isinstance(value, list) else [int(value)] * layers

    tensors = {t.name: t for t in reader.tensors}
    layers = listed("block_count", 1)[0]
    heads = listed("attention.head_count", layers)
    shared = listed("attention.head_count_kv", layers)
    hidden = listed("embedding_length", 1)[0]
    width = hidden // max(heads)
    keys = listed("attention.key_length", 1)[0] or width
    values = listed("attention.value_length", 1)[0] or width
    head = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    matrices = {
        name: t for name, t in tensors.items() if len(t.shape) > 1 and (name == head or name != "token_embd.weight")
    }
    experts = [t for name, t in matrices.items() if name.endswith("_exps.weight")]
    # Without the key, or for a file whose experts were cut below it, a token uses all.
    count = int(experts[0].shape[-1]) if experts else 1
    used = min(listed("expert_used_count", 1)[0] or count, count)
    stacked, stacked_bytes = sum(int(t.n_elements) for t in experts), sum(int(t.n_bytes) for t in experts)
    sizes: dict[int, int] = {}
    for tensor in matrices.values():
        sizes[tensor.tensor_type] = sizes.get(tensor.tensor_type, 0) + int(tensor.n_elements)
    head_macs = int(matrices[head].n_elements)
    work = Work(
        body_macs=sum(int(t.n_elements) for t in matrices.values()) - head_macs - stacked + stacked * used // count,
        head_macs=head_macs,
        pair_macs=sum(heads) * (keys + values),
        weight_bytes=sum(int(t.n_bytes) for t in matrices.values()) - stacked_bytes,
        routed_bytes={used / count: stacked_bytes} if experts else {},
        cache_bytes=sum(shared) * (keys + values) * _CACHE_ITEM,
    )
    return work, GGMLQuantizationType(max(sizes, key=lambda kind: sizes[kind])).name.lower()
