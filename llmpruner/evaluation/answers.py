"""Perplexity of answers after their questions, in the model's chat format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from pydantic import Field

from ..calibration.conversations import Example, read_examples
from ..component import ComponentSettings
from ..errors import DataError, SettingsError
from .base import ComparedModel, Metric, MetricSubject, Row
from .metrics import check_same_tokens, tokenizer_of


class AnswersMetric(Metric):
    """Mean loss in nats of the tokens of answers, each after its question in the model's chat format, as in recovery,
    and its perplexity. It measures a chat model as it is used; perplexity of plain text measures how a model continues
    documents. Tokens of questions and of the format are read and not counted, but for those that end an answer.

    With ``kl``, the divergence is from the first model's predictions of the same tokens, and both are in memory.
    """

    name = "answers"
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
        autocast: bool = Field(False, description="Compute in bfloat16 under autocast (faster, rounds).")

    settings: Settings

    @property
    def needs_reference(self) -> bool:
        return self.settings.kl

    @cached_property
    def _examples(self) -> Sequence[Example]:
        """Read on first use."""
        if self.settings.data is None:
            raise SettingsError(f"the metric {self.name} needs answers: --set {self.name}.data=FILE")
        return read_examples(self.settings.data)[: self.settings.limit]

    def prepare(self) -> None:
        _ = self._examples

    def check_models(self, models: Sequence[ComparedModel]) -> None:
        from ..models.positions import check_table

        what, hint = f"examples of {self.settings.cutoff:,} tokens", f"lower --set {self.name}.cutoff"
        for model in models:
            check_table(model.config, self.settings.cutoff, what, hint, f"'{model.name}'")
        if self.settings.kl:
            check_same_tokens(models, "\n".join(str(example) for example in self._examples[:64]))

    def measure(self, subject: MetricSubject) -> Mapping[str, Any]:
        """``examples``: texts with at least one token of an answer; ``tokens``: of answers, which are predicted;
        ``nll_per_token`` and ``kl_per_token``: means over them, in nats, the latter None without ``kl``."""
        import torch

        from ..calibration.chat import IGNORED, labelled, training_texts
        from ..models.tokenizer import check_ids
        from .perplexity import Scored

        tokenizer, family, cutoff = tokenizer_of(self, subject), subject.family, self.settings.cutoff
        texts = [text for example in self._examples for text in training_texts(example, family, tokenizer)]
        rows = [labelled(text, tokenizer, cutoff, "answers") for text in texts]
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
