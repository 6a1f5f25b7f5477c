"""Meta's ``tokenizer.model``: SentencePiece (Llama 1 and 2) or tiktoken (Llama 3)."""

from __future__ import annotations

import base64
import binascii
import itertools
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from llmpruner import CheckpointError

TOKENIZER = "tokenizer.model"
_BEGIN, _END, _END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"


def read_tokenizer(path: Path, *, scaled_rope: bool = False) -> Any:
    """A transformers tokenizer. ``scaled_rope``: of Llama 3.1 or later, with more named special tokens. Raises
    `CheckpointError` when the file is neither of the two kinds."""
    if (ranks := tiktoken_ranks(path)) is not None:
        return _tiktoken(path, ranks, scaled_rope)
    try:
        SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise CheckpointError(
            f"{path} is neither a SentencePiece model nor a tiktoken file: download it again"
        ) from None
    # from_pretrained finds tokenizer.model in the folder by name.
    return LlamaTokenizer.from_pretrained(str(path.parent), local_files_only=True, add_bos_token=True)


def tiktoken_ranks(path: Path) -> dict[bytes, int] | None:
    """Token bytes → rank, from lines "base64 rank"; None for a file of another kind."""
    ranks: dict[bytes, int] = {}
    with path.open("rb") as file:
        for line in file:
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                return None
    return ranks or None


def _tiktoken(path: Path, ranks: dict[bytes, int], scaled_rope: bool) -> Any:
    named = {0: _BEGIN, 1: _END, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: _END_OF_TURN}
    if scaled_rope:
        named |= {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
    # 256 special tokens follow the mergeable ones.
    free = itertools.count()
    special = [named.get(n) or f"<|reserved_special_token_{next(free)}|>" for n in range(256)]

    class Converter(TikTokenConverter):  # type: ignore[misc]
        # tiktoken's own loader caches by path, even when the file has changed.
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    # By default, it splits text as Llama 3 does.
    backend = Converter(vocab_file=str(path), extra_special_tokens=special).converted()
    template = processors.TemplateProcessing(
        single=f"{_BEGIN}:0 $A:0",
        pair=f"{_BEGIN}:0 $A:0 {_BEGIN}:1 $B:1",
        special_tokens=[(_BEGIN, backend.token_to_id(_BEGIN))],
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_BEGIN,
        eos_token=_END,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def stop_tokens(tokenizer: Any) -> list[int]:
    """Ids that end a generation: the end of the text and, for Llama 3, of an assistant's turn."""
    vocabulary = tokenizer.get_vocab()
    extra = [vocabulary[t] for t in (_END_OF_TURN, "<|eom_id|>") if t in vocabulary and t != tokenizer.eos_token]
    return [tokenizer.eos_token_id, *extra]
