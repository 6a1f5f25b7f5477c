"""Tokenizers of ChatGLM2, ChatGLM3 and original-format GLM-4 as fast tokenizers of transformers."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tiktoken.load import load_tiktoken_bpe
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SpmConverter, TikTokenConverter, import_protobuf

from llmpruner import CheckpointError, LlmprunerError, read_json

from .family import ROLES, ROUNDS

VOCABULARY_FILE = "tokenizer.model"

# Ids are after the SentencePiece vocabulary, in this order. The released tokenizers name "sop" and "eop" without
# brackets and do not search text for them; a fast tokenizer does, and would find "sop" in "philosophy".
_MARKS = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_STOPS = ("<|user|>", "<|observation|>")
_GLM4_TOKENS = (
    "<|endoftext|>", *_MARKS, *_ROLES,
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
# Each line of a tiktoken vocabulary: a token in base64, its rank.
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


def chat_format(directory: Path) -> str | None:
    """`ROLES` for a tokenizer with role tokens (ChatGLM3), `ROUNDS` without; None for GLM-4, and where there is no
    tokenizer."""
    vocabulary = directory / VOCABULARY_FILE
    if not vocabulary.is_file() or _is_tiktoken(vocabulary):
        return None
    for name in ("tokenizer_config.json", "tokenization_chatglm.py"):
        file = directory / name
        if file.is_file() and _ROLES[1] in file.read_text(encoding="utf-8", errors="replace"):
            return ROLES
    return ROUNDS


def role_stops(directory: Path) -> list[int]:
    """Ids of the role tokens at which generation by ChatGLM3 must stop, as a turn of another role starts."""
    with _one_line(directory / VOCABULARY_FILE):
        first = _sentencepiece(directory).get_piece_size() + len(_MARKS)
    return [first + _ROLES.index(token) for token in _STOPS]


def read_tokenizer(directory: Path) -> Any | None:
    """A fast tokenizer that pads to the left and starts every prompt with ``[gMASK] <sop>``; None without a vocabulary.

    Raises `CheckpointError` when the vocabulary is damaged.
    """
    file = directory / VOCABULARY_FILE
    if not file.is_file():
        return None
    with _one_line(file):
        return _from_tiktoken(directory) if _is_tiktoken(file) else _from_sentencepiece(directory)


@contextlib.contextmanager
def _one_line(file: Path) -> Iterator[None]:
    """Convert exceptions of tokenizer libraries for a damaged vocabulary to `CheckpointError` with one line."""
    try:
        yield
    except LlmprunerError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{file} is no readable vocabulary ({text[:200]}); download it again") from error


def _is_tiktoken(file: Path) -> bool:
    with file.open("rb") as stream:
        return _TIKTOKEN_LINE.fullmatch(stream.readline(4096)) is not None


def _sentencepiece(directory: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / VOCABULARY_FILE))


def _from_sentencepiece(directory: Path) -> Any:
    processor = _sentencepiece(directory)
    proto = import_protobuf().ModelProto.FromString(processor.serialized_model_proto())
    pieces = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    unigram = [(piece.piece, piece.score) for piece in proto.pieces]
    is_bpe = proto.trainer_spec.model_type == proto.trainer_spec.BPE
    tokenizer = SpmConverter.build_tokenizer_from_spm_proto(proto, pieces if is_bpe else unigram)
    controls = [piece.piece for piece in proto.pieces if piece.type in (2, 3)]
    roles = _ROLES if chat_format(directory) == ROLES else ()
    unknown, bos, eos = (processor.id_to_piece(i) for i in (processor.unk_id(), processor.bos_id(), processor.eos_id()))
    # The released tokenizers pad with the unknown token.
    names = {"unk_token": unknown, "pad_token": unknown, "bos_token": bos, "eos_token": eos}
    return _fast(tokenizer, [*controls, *_MARKS, *roles], names)


class _Converter(TikTokenConverter):  # type: ignore[misc]
    """tiktoken keeps a copy of every file that it read, and takes it by the path, unless it is told the hash."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        return load_tiktoken_bpe(tiktoken_url, hashlib.sha256(Path(tiktoken_url).read_bytes()).hexdigest())


def _from_tiktoken(directory: Path) -> Any:
    file = directory / "tokenizer_config.json"
    stored = read_json(file).get("added_tokens_decoder", {}) if file.is_file() else {}
    special = [stored[key]["content"] for key in sorted(stored, key=int)] or list(_GLM4_TOKENS)
    tokenizer = _Converter(str(directory / VOCABULARY_FILE)).converted()
    first = tokenizer.get_vocab_size()
    if stored and sorted(map(int, stored)) != list(range(first, first + len(stored))):
        raise CheckpointError(f"{file}: the added tokens do not follow the {first} tokens of {VOCABULARY_FILE}")
    names = {"pad_token": _GLM4_TOKENS[0], "eos_token": _GLM4_TOKENS[0]}
    return _fast(tokenizer, special, names)


def _fast(tokenizer: Any, special: Sequence[str], names: dict[str, str]) -> Any:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    start, eos = ("[gMASK]", "<sop>"), names["eos_token"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{' '.join(start)} $A",
        pair=f"{' '.join(start)} $A $B:0 {eos}:0",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (*start, eos)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[token for token in special if token not in names.values()],
        **names,
    )
