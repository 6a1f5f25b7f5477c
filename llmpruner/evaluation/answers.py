"""Perplexity of given answers, in the model's chat format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..calibration.conversations import Example, example_texts, read_examples
from ..component import ComponentSettings
from ..errors import DataError, SettingsError, no_tokenizer
from .base import ComparedModel, Metric, MetricSubject, Row
from .comparable import check_one_vocabulary, check_same_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..models.family import ModelFamily


_COMPARED = 64
"""Examples, from the start, by which tokenizers are compared."""


class AnswersMetric(Metric):
    """Mean loss in nats of the tokens of answers, each after its question in the model's chat format, as in recovery
    (`llmpruner.calibration.labelled`), and its perplexity. It measures a chat model as it is used; perplexity of plain
    text measures how a model continues documents. Tokens of questions and of the format are read and not counted, but
    for those that end an answer.

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

    def check_model(self, ref: str, config: PreTrainedConfig) -> None:
        from ..models.position_tables import check_table_of_config

        check_table_of_config(config, ref, self.settings.cutoff, *self._beyond())

    def check_pair(self, first: ComparedModel, other: ComparedModel) -> None:
        from ..calibration.chat import training_texts
        from ..calibration.labelled import labelled

        check_one_vocabulary(first, other)
        # Both models are given the texts in the format of the second.
        for example in self._examples[:_COMPARED]:
            for text in training_texts(example, other.family, other.tokenizer):
                rows = [labelled(text, one.tokenizer, self.settings.cutoff, "answers") for one in (first, other)]
                check_same_tokens(first, other, [row["input_ids"] for row in rows])

    def _beyond(self) -> tuple[str, str]:
        """What is beyond a model's positions, and how to get less, for messages."""
        return f"examples of {self.settings.cutoff:,} tokens", f"lower --set {self.name}.cutoff"

    def effort(self, part: str) -> float:
        # A token of a text in English has about four characters.
        return sum(map(len, self._all_texts())) / 4 * (2 if self.settings.kl else 1)

    def _all_texts(self) -> list[str]:
        return [text for one in self._examples for text in example_texts(one)]

    def depends_on(self, part: str) -> Mapping[str, Any]:
        content = json.dumps([asdict(one) for one in self._examples], sort_keys=True)
        return {**self.record(), "data": hashlib.sha256(content.encode()).hexdigest()}

    def texts(self) -> Mapping[str, str]:
        return {self.name: "\n".join(self._all_texts())}

    def measure(self, subject: MetricSubject) -> Mapping[str, Any]:
        """``examples``: texts with at least one token of an answer; ``tokens``: of answers, which are predicted;
        ``nll_per_token`` and ``kl_per_token``: means over them, in nats, the latter None without ``kl``."""
        from ..calibration.labelled import IGNORED
        from ..models.position_tables import check_table, warn_beyond
        from .perplexity import check_number, exponential

        if subject.tokenizer is None or subject.family is None:
            raise no_tokenizer(f"model '{subject.name}'", "it cannot read answers")
        reference = subject.reference if self.settings.kl else None
        check_table(subject.model, self.settings.cutoff, *self._beyond())
        total = divergence = 0.0
        tokens = 0
        rows = self._rows(subject.family, subject.tokenizer)
        longest = max(len(row["input_ids"]) for row in rows)
        how = f"--set {self.name}.cutoff leaves their ends out"
        warn_beyond(subject.model.config, subject.name, longest, f"examples of up to {longest:,} tokens", how)
        for row in subject.progress.track(rows, self.name):
            counted = [at for at, label in enumerate(row["labels"][1:]) if label != IGNORED]
            loss, kl = _losses(subject.model, reference, row["input_ids"], counted, self.settings.autocast)
            total, divergence, tokens = total + loss, divergence + kl, tokens + len(counted)
            check_number(total, subject.model)
        return {
            "perplexity": exponential(total / tokens),
            "nll_per_token": total / tokens,
            "kl_per_token": None if reference is None else divergence / tokens,
            "tokens": tokens,
            "examples": len(rows),
        }

    def _rows(self, family: ModelFamily, tokenizer: Any) -> list[dict[str, list[int]]]:
        """Tokens and labels of every text that has a token of an answer. Raises `DataError` where none has."""
        from ..calibration.chat import training_texts
        from ..calibration.labelled import IGNORED, labelled

        texts = [text for one in self._examples for text in training_texts(one, family, tokenizer)]
        rows = [labelled(text, tokenizer, self.settings.cutoff, "answers") for text in texts]
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


def _losses(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    ids: Sequence[int],
    counted: Sequence[int],
    autocast: bool,
) -> tuple[float, float]:
    """The sums, over the predictions after the tokens at ``counted``, of the negative log-likelihood of the token that
    follows and of KL(reference ‖ model), in nats; the latter 0 without a reference, or where it is the model itself."""
    import torch
    from torch.nn import functional

    from ..engine.divergence import check_vocabularies, divergences
    from ..models.vocabulary import check_ids, check_one_head

    ids_1T = check_ids(torch.tensor([list(ids)]), model)
    if reference is not None:
        check_one_head(reference, model)
    logits_NV = _predictions(model, ids_1T, counted, autocast)
    following_N = ids_1T[0, [at + 1 for at in counted]].to(logits_NV.device)
    loss = float(functional.cross_entropy(logits_NV.float(), following_N, reduction="none").double().sum())
    if reference is None or reference is model:
        return loss, 0.0
    wanted_NV = _predictions(reference, ids_1T, counted, autocast)
    check_vocabularies(wanted_NV, logits_NV)
    return loss, float(divergences(wanted_NV, logits_NV).double().sum())


def _predictions(model: PreTrainedModel, ids_1T: torch.Tensor, counted: Sequence[int], autocast: bool) -> torch.Tensor:
    """Logits (N, V) at the positions ``counted``."""
    import torch

    from ..models.precision import autocast_to

    placed = ids_1T.to(model.device)
    with torch.inference_mode(), autocast_to(placed.device.type, torch.bfloat16, enabled=autocast):
        logits_TV: torch.Tensor = model(
            input_ids=placed, attention_mask=torch.ones_like(placed), use_cache=False
        ).logits[0]
    return logits_TV[list(counted)]
