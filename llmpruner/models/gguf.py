"""Reading a GGUF file once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec


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
