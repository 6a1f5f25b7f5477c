"""The tokenizer of a model, token ids of texts, and the vocabulary that a model reads."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from transformers import TOKENIZER_MAPPING, AutoTokenizer

from ..errors import DataError, ModelError
from ..settings import LoadSettings
from .gguf import RECORDED_PRE, gguf_reader
from .messages import from_pretrained, in_one_line
from .reference import Reference
from .vocabulary import InTokens

if TYPE_CHECKING:
    from .model import Structure

LONGEST_WORD = 2000
"""Characters without a blank that are encoded at once: more than in words, or paragraphs without blanks."""


def load_tokenizer(structure: Structure, options: LoadSettings) -> Any | None:
    """The tokenizer of a model, without its weights; None where it has none."""
    reference = structure.reference
    if reference.reader is not None:
        with in_one_line(reference):
            return reference.reader.read_tokenizer(reference.directory)
    if not has_tokenizer(reference):
        return None
    # The tokenizer's class is found by the dense configuration; that of a pruned checkpoint needs its remote code.
    extra = {} if reference.gguf_file else {"config": structure.config}
    # A tokenizer that a plugin registers is used in place of code in the checkpoint, as its model is.
    config_class = type(structure.config)
    registered = config_class in TOKENIZER_MAPPING and not config_class.__module__.startswith("transformers.")
    trusted = options.trust_remote_code and not registered
    tokenizer = from_pretrained(AutoTokenizer, reference, trust_remote_code=trusted, **extra)
    fields = gguf_reader(reference.directory / reference.gguf_file).fields if reference.gguf_file else {}
    if pre := fields.get("tokenizer.ggml.pre"):
        # Saved with the tokenizer: transformers does not keep it, and a GGUF file of the pruned model needs it.
        tokenizer.init_kwargs[RECORDED_PRE] = str(pre.contents())
    return tokenizer


def has_tokenizer(reference: Reference) -> bool:
    """Whether a local model has a tokenizer; True for a hub model, as a check would download files."""
    if reference.reader is not None:
        with in_one_line(reference):
            return reference.reader.read_tokenizer(reference.directory) is not None
    if reference.gguf_file or not reference.directory.is_dir():
        return True
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    return any((reference.directory / name).is_file() for name in names)


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """The token ids of ``text`` without special tokens. Only words of more than `LONGEST_WORD` characters are cut."""
    starts = [0]
    for word in re.finditer(r"\S+", text) if len(text) > LONGEST_WORD else ():
        starts += range(word.start() + LONGEST_WORD, word.end(), LONGEST_WORD)
    ids: list[int] = []
    for start, stop in pairwise([*starts, len(text)]):
        ids += tokenizer(text[start:stop], add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def ids_to_continue(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """The token ids of a prompt. ``special``: with what the tokenizer puts before a text, but no end of sequence."""
    ids = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    eos = tokenizer.eos_token_id
    if special and eos is not None and ids[-1:] == [eos]:
        plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if plain and ids[:-1][-len(plain) :] == plain:
            ids.pop()
    return ids


def predicted_tokens(model: Any) -> int:
    """How many tokens a model predicts. Reads no weights."""
    if isinstance(model, InTokens):
        return len(model.old)
    # Some classes do not say what their head is; it has as many tokens as the embeddings.
    head = model.get_output_embeddings() or model.get_input_embeddings()
    return int(head.weight.shape[0])


def check_one_head(reference: Any, model: Any) -> None:
    """Raise `ModelError` for models that predict different numbers of tokens, so not the same tokens."""
    if (expected := predicted_tokens(reference)) != (predicted := predicted_tokens(model)):
        counts = f"the model predicts {predicted} tokens and the reference {expected}"
        raise ModelError(f"{counts}; KL divergence needs one vocabulary")


def padding_id(tokenizer: Any, model: Any, others: Iterable[int | None] = ()) -> int:
    """A token for padding that ``model`` has a row for: the tokenizer's, one of ``others``, the last of texts, or 0."""
    rows = model.get_input_embeddings().weight.shape[0]
    candidates = (tokenizer.pad_token_id, *others, tokenizer.eos_token_id, 0)
    return next(int(token) for token in candidates if token is not None and 0 <= token < rows)


def with_padding(tokenizer: Any, model: Any) -> Any:
    """``tokenizer``, or a copy of it with `padding_id` as its padding token: the original is saved with the model."""
    token = padding_id(tokenizer, model)
    if token != tokenizer.pad_token_id:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token)
    return tokenizer


def check_ids(ids: torch.Tensor, model: Any) -> torch.Tensor:
    """``ids``, if ``model`` can read them. Raises `DataError` for a tokenizer of another model."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = int(ids.max()) if ids.numel() else -1
    if largest >= rows:
        raise DataError(
            f"the tokenizer gives token {largest}, and the model has {rows} embeddings: it is that of another model"
        )
    return ids
