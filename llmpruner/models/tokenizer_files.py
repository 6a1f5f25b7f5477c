"""Which file of a tokenizer is damaged: transformers names none."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from ..errors import CheckpointError, first_line
from .record import read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
"""A model that has none of them brings no tokenizer."""
_FAST = "tokenizer.json"
_OBJECTS = (_FAST, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")


def damaged_tokenizer(directory: Path) -> str | None:
    """What is wrong with the first damaged file of a tokenizer in ``directory``; None where each can be read alone."""
    for name in _OBJECTS:
        file = directory / name
        if not file.is_file():
            continue
        try:
            read_json(file)
        except CheckpointError as error:
            return str(error)
        if name == _FAST:
            try:
                Tokenizer.from_file(str(file))
            except Exception as error:  # tokenizers raises no class of its own
                return f"{file} is damaged: {first_line(error)}"
    return None
