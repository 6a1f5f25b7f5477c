"""Turning off the warnings and progress bars of transformers."""

from __future__ import annotations

import contextlib
import logging as standard
from collections.abc import Iterator

from transformers import modeling_gguf_pytorch_utils as reader
from transformers.utils import logging


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the warnings and progress bars of transformers, and accelerate's of weights that stay in files."""
    placing = standard.getLogger("accelerate.big_modeling")
    said = placing.level
    placing.setLevel(standard.ERROR)
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        placing.setLevel(said)
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


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
