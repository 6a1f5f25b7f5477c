"""Models without weights, and transformers without chatter."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """An instance without weights: parameters on the meta device, small buffers (rotary tables) real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False), quiet_transformers():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    model.tie_weights()
    return cast("PreTrainedModel", model.eval())


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings and progress bars; errors still come through as exceptions."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_gguf() -> Iterator[None]:
    """`quiet_transformers` for reading a GGUF file: its bar over the tensors is tqdm's own, which asks nobody."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    own = vars(reader).get("tqdm")
    with quiet_transformers():
        if own is not None:
            reader.tqdm = logging.tqdm
        try:
            yield
        finally:
            if own is not None:
                reader.tqdm = own
