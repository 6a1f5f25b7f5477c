"""How many tokens a model reads, and logits of some positions alone."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import DataError, LlmprunerError, UnsupportedModelError
from .meta import REFUSALS, decoder_layers, meta_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


FIXED = "max_seq_len"
"""MPT's configuration has this name alone, and its code adds slopes for so many positions, no more."""


def positions_of(config: PreTrainedConfig) -> int | None:
    """The number of positions of the text model; None where its configuration sets no limit."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, FIXED, None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if getattr(text, "pad_token_id", None) is None or getattr(text, "rope_parameters", None):
        return limit
    return limit - _unused_rows(config, limit)


def _unused_rows(config: PreTrainedConfig, rows: int) -> int:
    """How many of so many rows of a table of positions are before the first one: RoBERTa counts from the number of the
    padding token on, which the table has too."""
    try:
        model = meta_model(config)
        tokens = model.get_input_embeddings()
    except (LlmprunerError, *REFUSALS):
        return 0  # opening the model says what is wrong
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    numbers = (table.padding_idx for table in tables if table.num_embeddings == rows)
    return max((number + 1 for number in numbers if number is not None), default=0)


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


def check_table(model: PreTrainedModel, tokens: int, what: str, advice: str) -> None:
    """Raise `DataError` for more ``tokens`` than ``model`` has a table of positions for. ``what``: they are, in the
    plural. ``advice``: to get fewer."""
    limit = table_of(model)
    if limit is not None and tokens > limit:
        raise DataError(f"{what} are beyond the model's {limit:,} positions; {advice}")


def table_of_config(config: PreTrainedConfig) -> int | None:
    """`table_of` for the model of ``config``, without its weights; None where it cannot be built."""
    if positions_of(config) is None:
        return None
    try:
        return table_of(meta_model(config))
    except (LlmprunerError, *REFUSALS):
        # Opening the model says what is wrong.
        return None


def check_table_of_config(config: PreTrainedConfig, ref: str, tokens: int, what: str, advice: str) -> None:
    """`check_table` for the model ``ref`` of ``config``, without its weights."""
    limit = positions_of(config)
    if limit is None or tokens <= limit:
        return
    table = table_of_config(config)
    if table is not None:
        raise DataError(f"{what} are beyond the {table:,} positions of '{ref}'; {advice}")


def warn_beyond(config: PreTrainedConfig, ref: str, tokens: int, what: str, advice: str) -> None:
    """Say that ``tokens``, which `check_table` took, are more than the model ``ref`` was trained with: one that
    computes positions runs on, and its predictions get worse. ``what`` and ``advice``: as there."""
    limit = positions_of(config)
    if limit is not None and tokens > limit:
        _LOG.warning("%s are beyond the %s positions that '%s' was trained with; %s", what, f"{limit:,}", ref, advice)


LOGIT_ELEMENTS = 1 << 24
"""Logits that are computed at once, if the model can: 64 MiB in float32."""


def computes_some_logits(model: PreTrainedModel) -> bool:
    """Whether the model's forward takes ``logits_to_keep``, as nearly all of transformers' do."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def last_logits(model: PreTrainedModel) -> dict[str, Any]:
    """The arguments by which a forward computes the logits of the last position alone; none where it cannot."""
    return {"logits_to_keep": 1} if computes_some_logits(model) else {}


def logits_at(model: PreTrainedModel, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits (B, n, V) of token ids (B, T) at ``positions`` (n,), int64. A model that `computes_some_logits` computes
    no others."""
    if computes_some_logits(model):
        logits: torch.Tensor = model(input_ids=input_ids, use_cache=False, logits_to_keep=positions).logits
        return logits
    every: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return every.index_select(1, positions)


def position_blocks(model: PreTrainedModel, input_ids: torch.Tensor, vocabulary: int) -> list[torch.Tensor]:
    """The positions of token ids (B, T) that predict a token, 0 to T - 2, in blocks of at most `LOGIT_ELEMENTS` logits
    and at least one position; in one block for a model that computes the logits of all positions anyway."""
    samples, length = input_ids.shape
    positions = torch.arange(length - 1, device=input_ids.device)
    if not computes_some_logits(model):
        return [positions]
    return list(torch.split(positions, max(1, LOGIT_ELEMENTS // (samples * vocabulary))))
