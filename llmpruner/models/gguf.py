"""Parsing a GGUF file once, and what transformers does not read of it."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import modeling_gguf_pytorch_utils as legacy
from transformers.utils import logging

from ..errors import CheckpointError, first_line

RECORDED_PRE = "gguf_pre"
"""Key of ``tokenizer_config.json``: the name that the GGUF file of the dense model has for its pre-tokenizer."""

SAME = 0.15
"""`head_difference` of an embedding that was quantised to 4 and to 6 bits is 0.08; of separate matrices, about 1.4."""

_load_original = legacy.load_gguf_checkpoint


@contextlib.contextmanager
def gguf_parsed_once() -> Iterator[None]:
    """Parse a GGUF file once, not four times as transformers does, which takes seconds; kept until `forget_gguf`."""
    import gguf

    with contextlib.ExitStack() as stack:
        for module, name, replacement in (
            (gguf, "GGUFReader", gguf_reader),
            (gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
            (legacy, "load_gguf_checkpoint", _load_gguf_checkpoint),
            (legacy, "tqdm", logging.tqdm),  # obeys the setting for progress bars
        ):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, replacement)
        yield


def gguf_reader(path: os.PathLike[str] | str) -> Any:
    """The ``gguf.GGUFReader`` of a file. It is parsed again when it has changed, or another one was read meanwhile."""
    return _parsed(os.path.realpath(path), Path(path).stat().st_mtime_ns)


def forget_gguf() -> None:
    """Free what was parsed."""
    _parsed.cache_clear()
    _metadata.cache_clear()


@lru_cache(maxsize=1)
def _parsed(path: str, changed: int) -> Any:
    # The reader keeps a view of the file's bytes for every token of the vocabulary. Views of a ``numpy.memmap`` take
    # three times the time and twice the memory of those of a plain array.
    from gguf.gguf_reader import GGUFReader

    def set_plain(reader: Any, name: str, value: Any) -> None:
        object.__setattr__(reader, name, value.view(np.ndarray) if name == "data" else value)

    try:
        return type("PlainReader", (GGUFReader,), {"__setattr__": set_plain})(path)
    except (ValueError, IndexError) as error:  # of numpy, where less is in the file than its header says
        reason = "is truncated" if "reshape" in str(error) else f"is damaged ({first_line(error)})"
        raise CheckpointError(f"{path} {reason}; download or write it again") from error


@lru_cache(maxsize=1)
def _metadata(path: str, changed: int) -> Any:
    """What transformers makes of a file without its tensors: ``config``, ``tokenizer``, …"""
    return _load_original(path)


def _load_gguf_checkpoint(gguf_checkpoint_path: str, return_tensors: bool = False, *args: Any, **options: Any) -> Any:
    path = os.path.realpath(gguf_checkpoint_path)
    if return_tensors:
        return _load_original(path, return_tensors, *args, **options)
    return copy.deepcopy(_metadata(path, Path(path).stat().st_mtime_ns))


def head_difference(path: Path) -> float | None:
    """How far the head of a GGUF file is from its embedding: the norm of their difference in a thousand rows, as a
    share of the embedding's. Quantised apart, one matrix differs by less than `SAME`; None for one that is stored once.
    """
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf_reader(path).tensors}
    both = [tensors[name] for name in ("output.weight", "token_embd.weight") if name in tensors]
    if len(both) < 2 or tuple(both[0].shape) != tuple(both[1].shape):
        return None
    step = max(1, int(both[0].shape[-1]) // 1000)
    head, embedding = (gguf.dequantize(tensor.data[::step], tensor.tensor_type) for tensor in both)
    return float(np.linalg.norm(head - embedding) / np.linalg.norm(embedding))
