"""Models that look positions up in a table, and so read no more tokens than it has rows (GPT-2, OPT, RoBERTa)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import nn

from ..errors import DataError, LlmprunerError, UnsupportedModelError
from .decoder import decoder_layers
from .empty import REFUSALS, meta_model
from .positions import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_LOG = logging.getLogger("llmpruner")

_MORE_ROWS = 2
"""OPT and BART have this many rows more than positions."""
_BUFFERS = ("embed_positions", "pos_encoding")
"""Of GPT-J and CodeGen, and of CTRL. Other buffers of positions grow."""


def table_of(model: PreTrainedModel) -> int | None:
    """The number of positions of ``model``, which may be on the meta device, where it has a table of them, or cannot
    read more for another reason; None for a model that computes positions, such as a rotary one."""
    limit = positions_of(model.config)
    if limit is None:
        return None
    if not hasattr(model.config.get_text_config(), "max_position_embeddings"):
        return limit
    try:
        path = decoder_layers(model).rpartition(".")[0]
    except UnsupportedModelError:
        return None
    # Encoders of images, beside what has the layers and the embeddings, have tables of their own.
    tokens = model.get_input_embeddings()
    while path and all(module is not tokens for module in model.get_submodule(path).modules()):
        path = path.rpartition(".")[0]
    decoder = model.get_submodule(path)
    embeddings = (m for m in decoder.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    rows = {m.num_embeddings - (0 if m.padding_idx is None else m.padding_idx + 1) for m in embeddings}
    rows |= {len(buffer) for name, buffer in decoder.named_buffers() if name.rpartition(".")[2] in _BUFFERS}
    return limit if any(limit <= count <= limit + _MORE_ROWS for count in rows) else None


def check_table(model: PreTrainedModel, tokens: int, what: str, how: str) -> None:
    """Raise `DataError` for more ``tokens`` than ``model`` has a table of positions for. ``what``: they are, in the
    plural. ``how``: to get fewer."""
    limit = table_of(model)
    if limit is not None and tokens > limit:
        raise DataError(f"{what} are beyond the model's {limit:,} positions; {how}")


def table_of_config(config: PreTrainedConfig) -> int | None:
    """`table_of` for the model of ``config``, without its weights; None where it cannot be built."""
    if positions_of(config) is None:
        return None
    try:
        return table_of(meta_model(config))
    except (LlmprunerError, *REFUSALS):
        # Opening the model says what is wrong.
        return None


def check_table_of_config(config: PreTrainedConfig, ref: str, tokens: int, what: str, how: str) -> None:
    """`check_table` for the model ``ref`` of ``config``, without its weights."""
    limit = positions_of(config)
    if limit is None or tokens <= limit:
        return
    found = table_of_config(config)
    if found is not None:
        raise DataError(f"{what} are beyond the {found:,} positions of '{ref}'; {how}")


def warn_beyond(config: PreTrainedConfig, ref: str, tokens: int, what: str, how: str) -> None:
    """Say that ``tokens``, which `check_table` took, are more than the model ``ref`` was trained with: one that
    computes positions runs on, and its predictions get worse. ``what`` and ``how``: as there."""
    limit = positions_of(config)
    if limit is not None and tokens > limit:
        _LOG.warning("%s are beyond the %s positions that '%s' was trained with; %s", what, f"{limit:,}", ref, how)
