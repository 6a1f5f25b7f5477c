"""Perplexity of answers after their questions, in the model's chat format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..calibration.conversations import Example, read_examples
from ..component import ComponentSettings
from ..errors import DataError, SettingsError, no_tokenizer
from .base import ComparedModel, Metric, MetricSubject, Row
from .metrics import check_same_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


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
        from ..models.positions import check_table_of_config

        what, hint = f"examples of {self.settings.cutoff:,} tokens", f"lower --set {self.name}.cutoff"
        for model in models:
            check_table_of_config(model.config, model.name, self.settings.cutoff, what, hint)
        if self.settings.kl:
            check_same_tokens(models, "\n".join(str(example) for example in self._examples[:64]))

    def measure(self, subject: MetricSubject) -> Mapping[str, Any]:
        """``examples``: texts with at least one token of an answer; ``tokens``: of answers, which are predicted;
        ``nll_per_token`` and ``kl_per_token``: means over them, in nats, the latter None without ``kl``."""
        from ..calibration.chat import IGNORED
        from .perplexity import check_number, exponential

        reference = subject.reference if self.settings.kl else None
        loss = divergence = 0.0
        tokens = 0
        rows = self._rows(subject)
        for row in subject.progress.track(rows, self.name):
            counted = [place for place, label in enumerate(row["labels"][1:]) if label != IGNORED]
            sums = _sums(subject.model, reference, row["input_ids"], counted, self.settings.autocast)
            loss, divergence, tokens = loss + sums[0], divergence + sums[1], tokens + len(counted)
            check_number(loss, subject.model)
        return {
            "perplexity": exponential(loss / tokens),
            "nll_per_token": loss / tokens,
            "kl_per_token": None if reference is None else divergence / tokens,
            "tokens": tokens,
            "examples": len(rows),
        }

    def _rows(self, subject: MetricSubject) -> list[dict[str, list[int]]]:
        """Tokens and labels of every text that has a token of an answer. Raises `DataError` where none has."""
        from ..calibration.chat import IGNORED, labelled, training_texts

        if subject.tokenizer is None or subject.family is None:
            raise no_tokenizer(f"model '{subject.name}'", "it cannot read answers")
        texts = [
            text for example in self._examples for text in training_texts(example, subject.family, subject.tokenizer)
        ]
        rows = [labelled(text, subject.tokenizer, self.settings.cutoff, "answers") for text in texts]
        # The first token of a text is not predicted.
        rows = [row for row in rows if any(label != IGNORED for label in row["labels"][1:])]
        if not rows:
            raise DataError(
                f"{self.settings.data}: no example has an answer within the first {self.settings.cutoff} tokens"
            )
        return rows

    def rows(self, result: Mapping[str, Any]) -> Sequence[Row]:
        return [
            Row("perplexity of answers", result["perplexity"], False),
            Row("KL to the first, answers", result["kl_per_token"], False),
        ]


def _sums(
    model: PreTrainedModel, reference: PreTrainedModel | None, ids: list[int], counted: list[int], autocast: bool
) -> tuple[float, float]:
    """The sums, over the predictions after the tokens at ``counted``, of the negative log-likelihood of the token that
    follows and of KL(reference ‖ model), in nats; the latter 0 without a reference, or where it is the model itself."""
    import torch
    from torch.nn import functional

    from ..engine.statistics import check_vocabularies, divergences
    from ..models.tokenizer import check_ids
    from .perplexity import predictions

    ids_1T = check_ids(torch.tensor([ids]), model)

    def logits_of(one: PreTrainedModel) -> torch.Tensor:
        return predictions(one, ids_1T.to(one.device), autocast)[0][counted]

    logits_NV = logits_of(model)
    following_N = ids_1T[0, [place + 1 for place in counted]].to(logits_NV.device)
    loss = float(functional.cross_entropy(logits_NV.float(), following_N, reduction="none").double().sum())
    if reference is None or reference is model:
        return loss, 0.0
    reference_NV = logits_of(reference)
    check_vocabularies(reference_NV, logits_NV)
    return loss, float(divergences(reference_NV, logits_NV).double().sum())
