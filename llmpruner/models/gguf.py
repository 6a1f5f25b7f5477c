"""Parsing a GGUF file once, and what transformers does not read of it."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from transformers import modeling_gguf_pytorch_utils as legacy

from .messages import quiet_transformers

RECORDED_PRE = "gguf_pre"
"""Key of ``tokenizer_config.json``: the name that the GGUF file of the dense model has for its pre-tokenizer."""


@dataclass
class _Parsed:
    """``file``: its path, time of change and size. ``reader``: a ``gguf.GGUFReader``. ``metadata``: what
    ``load_gguf_checkpoint`` makes of it without tensors; None as long as nothing asked for it."""

    file: tuple[str, int, int]
    reader: Any
    metadata: dict[str, Any] | None = None


_last: _Parsed | None = None
"""Of one file, as parsing takes seconds for a large vocabulary, and the result takes more memory than the vocabulary.
It is there from the first look at a model until its weights are loaded."""


@contextlib.contextmanager
def gguf_parsed_once(*, keep: bool = False) -> Iterator[None]:
    """Share what is parsed of a GGUF file, and its map of tensor names, between the calls of transformers.

    For the configuration, the tokenizer and the weights, transformers parses the same file four times, and it makes the
    map of names for every module. ``keep``: what was parsed stays for the next block; otherwise it is freed.
    """
    if find_spec("gguf") is None:
        yield
        return
    import gguf

    with contextlib.ExitStack() as stack:
        if not keep:
            stack.callback(forget_gguf)
        if gguf.GGUFReader is not gguf_reader:  # not inside another block
            # transformers takes them from their modules whenever it calls them.
            for module, name, function in (
                (gguf, "GGUFReader", gguf_reader),
                (gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
                (legacy, "load_gguf_checkpoint", _load_gguf_checkpoint),
            ):
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, function)
        yield


def gguf_reader(path: os.PathLike[str] | str) -> Any:
    """The ``gguf.GGUFReader`` of a file, which is parsed if it is not the last one, or has changed."""
    return _parsed(path).reader


def gguf_metadata(path: os.PathLike[str] | str) -> dict[str, Any]:
    """What transformers makes of a file without its tensors: ``config``, ``tokenizer``, …; a copy."""
    parsed = _parsed(path)
    if parsed.metadata is None:
        with gguf_parsed_once(keep=True), quiet_transformers():
            parsed.metadata = _OWN_LOAD(str(path))
    return copy.deepcopy(parsed.metadata)


def forget_gguf() -> None:
    """Free what was parsed."""
    global _last
    _last = None


def pre_tokenizer_of(path: Path) -> str | None:
    """How the tokenizer of a GGUF file splits text, by llama.cpp's name for it; None where the file has none."""
    field = gguf_reader(path).fields.get("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())


def _parsed(path: os.PathLike[str] | str) -> _Parsed:
    global _last
    real, facts = os.path.realpath(path), Path(path).stat()
    file = real, facts.st_mtime_ns, facts.st_size
    if _last is None or _last.file != file:
        forget_gguf()  # before another one takes memory
        _last = _Parsed(file, _reader_class()(real))
    return _last


@cache
def _reader_class() -> Any:
    """``GGUFReader`` with a plain array for the bytes of the file. It makes a view of them for every token of the
    vocabulary, and views of a ``numpy.memmap`` take three times the time and twice the memory."""
    from gguf.gguf_reader import GGUFReader

    def put(reader: Any, mapped: np.ndarray[Any, Any]) -> None:
        vars(reader)["bytes"] = mapped.view(np.ndarray)

    return type("PlainReader", (GGUFReader,), {"data": property(lambda reader: vars(reader)["bytes"], put)})


_OWN_LOAD = legacy.load_gguf_checkpoint


def _load_gguf_checkpoint(
    gguf_checkpoint_path: str, return_tensors: bool = False, *arguments: Any, **options: Any
) -> dict[str, Any]:
    if not return_tensors:
        return gguf_metadata(gguf_checkpoint_path)
    loaded: dict[str, Any] = _OWN_LOAD(gguf_checkpoint_path, return_tensors, *arguments, **options)
    return loaded
