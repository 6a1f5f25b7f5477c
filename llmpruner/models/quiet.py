"""Turning off the warnings and progress bars of transformers."""

from __future__ import annotations

import contextlib
import logging as standard
import threading
from collections.abc import Iterator

from transformers import modeling_gguf_pytorch_utils as reader
from transformers.utils import logging

_ONE = threading.RLock()
_inside = 0
"""How many `quiet_transformers` are active, in all threads."""
_before = contextlib.ExitStack()
"""Restores what the first of them changed."""


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the warnings and progress bars of transformers, and accelerate's of weights that stay in files. The
    settings are those of the process: they are restored when the last thread that changed them is done."""
    global _inside
    with _ONE:
        if not _inside:
            _silence()
        _inside += 1
    try:
        yield
    finally:
        with _ONE:
            _inside -= 1
            if not _inside:
                _before.close()


def _silence() -> None:
    placing = standard.getLogger("accelerate.big_modeling")
    _before.callback(placing.setLevel, placing.level)
    placing.setLevel(standard.ERROR)
    _before.callback(logging.set_verbosity, logging.get_verbosity())
    logging.set_verbosity_error()
    if logging.is_progress_bar_enabled():
        _before.callback(logging.enable_progress_bar)
    logging.disable_progress_bar()


@contextlib.contextmanager
def quiet_gguf() -> Iterator[None]:
    """`quiet_transformers` for reading a GGUF file, whose progress bar ignores the setting of transformers."""
    own = vars(reader).get("tqdm")
    with quiet_transformers():
        if own is not None:
            reader.tqdm = logging.tqdm
        try:
            yield
        finally:
            if own is not None:
                reader.tqdm = own
