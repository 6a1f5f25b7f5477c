"""Answers in the model's chat format: what a model answers, and the perplexity of given answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from statistics import fmean
from typing import Any

from pydantic import Field

from ..calibration.conversations import read_examples
from ..component import ComponentSettings
from ..errors import DataError, SettingsError
from .base import ComparedModel, Metric, MetricSubject, Row
from .metrics import check_same_tokens

_FIRST = 16
_RUN, _REPEATED = 4, 0.25


class AnswersMetric(Metric):
    """What the model answers, by the likeliest tokens, to the 40 instructions of ``instructions.txt``. Nothing in
    llmpruner calibrates or trains on them."""

    name = "answers"
    summary = (
        "answers to 40 instructions: how many repeat themselves or are cut off, and how far they are the first model's"
    )

    class Settings(ComponentSettings):
        tokens: int = Field(128, ge=2, description="Tokens of an answer; longer ones are cut off.")

    settings: Settings
    _first: tuple[Any, list[list[int]]] | None = None
    """The first model's tokenizer, and the first tokens of its answers."""

    def measure(self, subject: MetricSubject) -> Mapping[str, Any]:
        """``repeat_themselves``: the share of answers in which over a quarter of the runs of `_RUN` tokens occur before
        in the answer. ``cut_off``: of those that did not end within ``tokens``. ``first_tokens``: how much of the
        first model's first `_FIRST` tokens an answer begins with, a mean of shares. ``texts``: the answers."""
        from ..calibration.chat import chat_prompt, common_start
        from ..calibration.written import answered
        from ..models.generation import text_before
        from ..models.tokenizer import ids_to_continue, tokens_of

        tokenizer, stop = subject.tokenizer, subject.family.stop_text
        lines = (files(__package__) / "instructions.txt").read_text(encoding="utf-8").splitlines()
        asked = [chat_prompt(subject.family, tokenizer, line) for line in lines]
        prompts = [ids_to_continue(tokenizer, each.text, special=not each.has_special_tokens) for each in asked]
        written = answered(subject.model, tokenizer, prompts, self.settings.tokens)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
        ended = [
            len(ids) < self.settings.tokens or (stop or "\0") in text for ids, text in zip(written, texts, strict=True)
        ]
        answers = [text_before(text, stop).strip() for text in texts]
        reader, expected = self._first or (tokenizer, [tokens_of(tokenizer, text)[:_FIRST] for text in answers])
        self._first = reader, expected
        begun = [common_start(one, tokens_of(reader, text)) for one, text in zip(expected, answers, strict=True)]
        return {
            "repeat_themselves": fmean(repeated(tokens_of(tokenizer, text)) > _REPEATED for text in answers),
            "cut_off": 1 - fmean(ended),
            "first_tokens": fmean(count / len(one) if one else 1.0 for count, one in zip(begun, expected, strict=True)),
            "texts": answers,
        }

    def rows(self, result: Mapping[str, Any]) -> Sequence[Row]:
        return [
            Row("answers that repeat", result["repeat_themselves"], False),
            Row("answers cut off", result["cut_off"], False),
            Row("answers starting as the first", result["first_tokens"], True),
        ]


def repeated(ids: Sequence[int]) -> float:
    """The share of runs of `_RUN` tokens that occur before in ``ids`` (Welleck et al., 2020, seq-rep-4)."""
    runs = [tuple(ids[at : at + _RUN]) for at in range(len(ids) - _RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


class GivenAnswersMetric(Metric):
    """Mean loss in nats of the tokens of answers, each after its question in the model's chat format, as in recovery,
    and its perplexity. It measures a chat model as it is used; perplexity of plain text measures how a model continues
    documents. Tokens of questions and of the format are read and not counted, but for those that end an answer.

    With ``kl``, the divergence is from the first model's predictions of the same tokens, and both are in memory.
    """

    name = "given-answers"
    summary = "perplexity of given answers in the model's chat format; with kl also the divergence from the first model"

    class Settings(ComponentSettings):
        data: str | None = Field(
            None,
            description="Instructions with answers, or conversations, in the forms of `llmpruner recover --data`; it "
            "must be given.",
        )
        limit: int | None = Field(None, ge=1, description="Number of examples, from the start; all by default.")
        cutoff: int = Field(1024, ge=2, description="Tokens of an example that are used, from its start.")
        kl: bool = Field(False, description="Also the KL divergence from the first model (both models are in memory).")
        autocast: bool = Field(False, description="Compute in bfloat16 under autocast where that is faster (rounds).")

    settings: Settings

    @property
    def needs_reference(self) -> bool:
        return self.settings.kl

    def prepare(self) -> None:
        if self.settings.data is None:
            raise SettingsError(f"the metric {self.name} needs answers: --set {self.name}.data=FILE")
        self._examples = read_examples(self.settings.data)[: self.settings.limit]

    def check_models(self, models: Sequence[ComparedModel]) -> None:
        from ..models.positions import check_table

        what, hint = f"examples of {self.settings.cutoff:,} tokens", f"lower --set {self.name}.cutoff"
        for model in models:
            check_table(model.config, self.settings.cutoff, what, hint, f"'{model.name}'")
        if self.settings.kl:
            check_same_tokens(models, "\n".join(str(example) for _, example in self._examples[:64]))

    def measure(self, subject: MetricSubject) -> Mapping[str, Any]:
        """``examples``: texts with at least one token of an answer; ``tokens``: of answers, which are predicted;
        ``nll_per_token`` and ``kl_per_token``: means over them, in nats, the latter None without ``kl``."""
        import torch

        from ..calibration.chat import IGNORED, labelled, texts_at
        from ..models.tokenizer import check_ids
        from .perplexity import Scored

        tokenizer, family, cutoff = subject.tokenizer, subject.family, self.settings.cutoff
        texts = [text for at, example in self._examples for text in texts_at(at, example, family, tokenizer)]
        rows = [labelled(text, tokenizer, cutoff) for text in texts]
        # The first token of a text is not predicted.
        rows = [row for row in rows if any(label != IGNORED for label in row["labels"][1:])]
        if not rows:
            raise DataError(f"{self.settings.data}: no example has an answer within the first {cutoff} tokens")
        scored = Scored(subject.model, subject.reference if self.settings.kl else None, self.settings.autocast)
        for row in subject.progress.track(rows, self.name):
            counting = [place for place, label in enumerate(row["labels"][1:]) if label != IGNORED]
            scored.add(check_ids(torch.tensor([row["input_ids"]]), subject.model), torch.tensor(counting))
        means = scored.means()
        del means["top1_agreement"]
        return {**means, "tokens": scored.tokens, "examples": len(rows)}

    def rows(self, result: Mapping[str, Any]) -> Sequence[Row]:
        return [
            Row("perplexity of answers", result["perplexity"], False),
            Row("KL to the first, answers", result["kl_per_token"], False),
        ]
