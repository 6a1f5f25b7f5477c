"""The tokenizer of a model, token ids of texts, and the vocabulary that a model reads."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TOKENIZER_MAPPING, AutoTokenizer

from ..errors import DataError, ModelError
from ..settings import LoadSettings
from .checkpoint import adapter_base
from .gguf import RECORDED_PRE, gguf_reader
from .messages import in_one_line, quiet_transformers
from .reference import Reference, resolve
from .trimmed import InTokens

if TYPE_CHECKING:
    from ..plugins.catalog import Catalog
    from .model import Structure


def load_tokenizer(structure: Structure, options: LoadSettings) -> Any | None:
    """The tokenizer of a model, without its weights; None where it has none."""
    ref = structure.place
    if ref.reader is not None:
        return ref.reader.read_tokenizer(ref.directory)
    if not _may_have_tokenizer(ref):
        return None
    # The tokenizer's class is found by the dense configuration; that of a pruned checkpoint needs its remote code.
    extra: dict[str, Any] = ref.gguf_argument or {"config": structure.config}
    # A tokenizer that a plugin registers is used in place of code in the checkpoint, as its model is.
    kind = type(structure.config)
    registered = kind in TOKENIZER_MAPPING and not kind.__module__.startswith("transformers.")
    trust = options.trust_remote_code and not registered
    with in_one_line(ref), quiet_transformers(), ref.parsed_once():
        tokenizer = AutoTokenizer.from_pretrained(
            ref.location, revision=structure.revision, trust_remote_code=trust, **extra
        )
    if ref.gguf_file:
        pre = gguf_reader(ref.directory / ref.gguf_file).fields.get("tokenizer.ggml.pre")
        if pre is not None:
            # Saved with the tokenizer: transformers does not keep it, and a GGUF file of the pruned model needs it.
            tokenizer.init_kwargs[RECORDED_PRE] = str(pre.contents())
    return tokenizer


def brings_tokenizer(text: str, catalog: Catalog) -> bool:
    """Whether a local model has a tokenizer; True for a hub model, as a check would download files."""
    ref = resolve(adapter_base(Path(text)) or text, catalog)
    if ref.reader is not None:
        return ref.reader.read_tokenizer(ref.directory) is not None
    return _may_have_tokenizer(ref)


def _may_have_tokenizer(ref: Reference) -> bool:
    if ref.gguf_file or not ref.directory.is_dir():
        return True
    return any((ref.directory / name).is_file() for name in TOKENIZER_FILES)


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
"""A model that has none of them brings no tokenizer."""
LONGEST_WORD = 2000
"""Characters without a blank that are encoded at once. Words are shorter, and so are most paragraphs in scripts without
blanks."""
_WORD = re.compile(r"\S+")


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """The token ids of ``text``, without special tokens. Text is encoded as one string, but for runs of more than
    `LONGEST_WORD` characters without a blank, which are cut at every so many."""
    ids: list[int] = []
    for piece in _pieces(text):
        ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def ids_to_continue(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """The token ids of a text that goes on, such as a prompt. ``special``: with what the tokenizer puts before a text,
    without an end-of-sequence token that it puts after each (``add_eos_token``)."""
    ids = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    eos = tokenizer.eos_token_id
    if special and eos is not None and ids[-1:] == [eos]:
        own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if own and ids[:-1][-len(own) :] == own:
            ids.pop()
    return ids


def _pieces(text: str) -> Iterator[str]:
    start = 0
    for word in _WORD.finditer(text) if len(text) > LONGEST_WORD else ():
        for stop in range(word.start() + LONGEST_WORD, word.end(), LONGEST_WORD):
            yield text[start:stop]
            start = stop
    if start < len(text) or not text:
        yield text[start:]


def predicted_tokens(model: Any) -> int:
    """How many tokens a model predicts. Reads no weights."""
    if isinstance(model, InTokens):
        return len(model.old)
    # Some classes do not say what their head is; it has as many tokens as the embeddings.
    head = model.get_output_embeddings() or model.get_input_embeddings()
    return int(head.weight.shape[0])


def check_one_head(reference: Any, model: Any) -> None:
    """Raise `ModelError` for models that predict different numbers of tokens: one cannot read what the other can, and
    their predictions are not of the same tokens."""
    expected, predicted = predicted_tokens(reference), predicted_tokens(model)
    if expected != predicted:
        raise ModelError(
            f"the model predicts {predicted} tokens and the reference {expected}; KL divergence needs one vocabulary"
        )


def embedding_rows(model: Any) -> int:
    """How many tokens a model reads. Reads no weights."""
    return int(model.get_input_embeddings().weight.shape[0])


def padding_id(tokenizer: Any, model: Any, others: Iterable[int | None] = ()) -> int:
    """A token for padding, which is masked, but looked up in the embeddings all the same: the tokenizer's, if ``model``
    can read it, which it cannot where one was added to the tokenizer alone; else one of ``others``, the end of the
    sequence, or 0."""
    rows = embedding_rows(model)
    candidates = (tokenizer.pad_token_id, *others, tokenizer.eos_token_id, 0)
    return next(int(token) for token in candidates if token is not None and 0 <= token < rows)


def with_padding(tokenizer: Any, model: Any) -> Any:
    """``tokenizer`` with `padding_id` as its padding token; a copy where that is another one, as the tokenizer is saved
    with the model."""
    token = padding_id(tokenizer, model)
    if token == tokenizer.pad_token_id:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token)
    return tokenizer


def check_ids(ids: torch.Tensor, model: Any) -> torch.Tensor:
    """``ids``, once it is sure that ``model`` can read them. Raises `DataError` for a tokenizer of another model."""
    if not ids.numel():
        return ids
    rows = embedding_rows(model)
    largest = int(ids.max())
    if largest >= rows:
        raise DataError(
            f"the tokenizer gives token {largest}, and the model has {rows} embeddings: it is that of another model"
        )
    return ids
