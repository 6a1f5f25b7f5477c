"""Reading a GGUF file once, and what transformers does not read of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

RECORDED_PRE = "gguf_pre"
"""Key of ``tokenizer_config.json``: the name that the GGUF file of the dense model has for its pre-tokenizer."""


@contextlib.contextmanager
def gguf_parsed_once() -> Iterator[None]:
    """Share what is parsed of a GGUF file, and its map of tensor names, between the calls of transformers.

    For the configuration, the tokenizer and the weights, transformers parses the same file four times, which takes
    seconds each time, and it makes the map of names for every module.
    """
    if find_spec("gguf") is None:
        yield
        return
    import gguf

    own = {name: vars(gguf)[name] for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        # transformers takes both from the package whenever it calls them.
        for name, function in own.items():
            setattr(gguf, name, cache(function))
        yield
    finally:
        for name, function in own.items():
            setattr(gguf, name, function)


def pre_tokenizer_of(path: Path) -> str | None:
    """How the tokenizer of a GGUF file splits text, by llama.cpp's name for it; None where the file has none."""
    import gguf

    field = gguf.GGUFReader(str(path)).fields.get("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())
