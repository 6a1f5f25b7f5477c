"""Finding and loading models: a hub id, a directory, a ``.gguf`` file, ``demo``, or what a reader adds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """An instance without weights: parameters on the meta device, small buffers (rotary tables) real."""
    import copy

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
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
