"""The criterion for tokens of the vocabulary: how much text would arrive in pieces without them."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from ...calibration.documents import check_source, read_documents
from ...component import ComponentSettings
from ...engine.signals import Signal, TokenStats
from ...errors import near
from ...values import Names
from .base import ImportanceCriterion

if TYPE_CHECKING:
    import torch

    from ...engine.walk import CalibrationSet

PIECES = 6.0
"""What text costs more, in nats, where a token arrives in pieces: about the mean of log p(token) − log p(its first
piece), for all tokens alike. It matters only where tokens are compared with other units."""
PREDICTION = 16
"""Tokens of text that one prediction of the model is worth, which is about all tokens at once."""
PRIOR = 1_000_000
"""Tokens of text that the rank of a token in the vocabulary is worth."""


def _readable(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        check_source(name)
    return names


def _known_scripts(names: tuple[str, ...]) -> tuple[str, ...]:
    known = {script.lower() for script in scripts_of("".join(map(chr, range(0x20000))))}
    for name in names:
        if name.lower() not in known:
            raise ValueError(f"Unicode has no script '{name}'{near(name, known)}")
    return names


class TokenUse(ImportanceCriterion):
    """The share of text that is written in a token, times `PIECES`, in nats per token of text: how often it is in the
    calibration text, and expected there by the model (`PREDICTION`), with a prior (`PRIOR`) by its rank r in the
    vocabulary, 1 / (r + 10) by Zipf's law, as merges are in the order of their use."""

    name = "vocabulary"
    summary = "for tokens: their share of the calibration text and of the model's predictions, with their rank as prior"
    needs = frozenset({Signal.TOKENS})

    class Settings(ComponentSettings):
        tokens: int | None = Field(
            None, ge=1, description="Number of tokens to keep, in place of --ratio; with --kinds vocabulary alone."
        )
        keep: Annotated[Names, AfterValidator(_readable)] = Field(
            (), description="Files with text whose tokens go last, whatever the calibration text is."
        )
        scripts: Annotated[Names, AfterValidator(_known_scripts)] = Field(
            (), description="Scripts to keep, such as latin,cyrillic,cjk: tokens with letters of others go first."
        )

    settings: Settings

    def score_tokens(self, use: TokenStats) -> torch.Tensor:
        import torch

        ranks = torch.arange(len(use.counts), dtype=torch.float64)
        prior = 1 / (ranks + 10)
        share = use.counts + PREDICTION * use.expected + PRIOR * prior / prior.sum()
        share = share / (int(use.counts.sum()) + PREDICTION * use.predicted + PRIOR)
        if use.tokenizer is not None:
            share[len(use.tokenizer) :] = 0  # rows that no token has
            for text in (document for name in self.settings.keep for document in read_documents(name)):
                ids = torch.tensor(use.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]).long()
                share[ids[ids < len(share)]] += 1  # added tokens may have no row
            if self.settings.scripts:
                kept = {name.upper() for name in self.settings.scripts}
                for token, text in enumerate(texts_of(use.tokenizer)[: len(share)]):
                    if scripts_of(text) - kept:
                        share[token] *= 1e-9
        return share * PIECES


def texts_of(tokenizer: Any) -> list[str]:
    """The text of every token; those of single bytes are replacement characters."""
    return [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in range(len(tokenizer))]


def scripts_of(text: str) -> set[str]:
    """The scripts of the letters in ``text``, as Unicode's names of characters begin: LATIN, CYRILLIC, CJK."""
    return {unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha()}


def counted_part(text: CalibrationSet) -> CalibrationSet:
    """The part of a calibration text on which tokens are counted; the rest tells how many other texts need."""
    return text.first(text.input_ids.numel() * 7 // 8)
