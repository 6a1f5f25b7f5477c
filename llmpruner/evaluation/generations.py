"""The same prompts answered by every model, and where the answers part from those of the first."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..calibration.documents import read_documents
from ..component import ComponentSettings
from ..errors import no_tokenizer
from .base import Metric, MetricSubject, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROMPTS = (
    "Why is the sky blue?",
    "Write a short letter to a friend about a day at the sea.",
    "A train leaves at 9:40 and arrives at 12:05. How long is the journey?",
    "List three things to check before buying a used bicycle.",
)


class GenerationsMetric(Metric):
    """Greedy answers, compared token by token with those of the first model. Both models are in memory."""

    name = "generations"
    summary = "answers to the same prompts, and after how many tokens they part from those of the first model"

    class Settings(ComponentSettings):
        prompts: str | None = Field(
            None, description="A file with one prompt a record (.jsonl, .json, .parquet); by default four questions."
        )
        limit: int = Field(32, ge=1, description="Number of prompts, from the start of the file.")
        new_tokens: int = Field(64, ge=1, description="Tokens of an answer, at most.")
        chat: bool = Field(True, description="Ask in the model's chat format; else the prompt is continued.")

    settings: Settings

    @property
    def needs_reference(self) -> bool:
        return True

    @cached_property
    def _prompts(self) -> tuple[str, ...]:
        given = self.settings.prompts
        return (_PROMPTS if given is None else tuple(read_documents(given)))[: self.settings.limit]

    def prepare(self) -> None:
        _ = self._prompts
        self._answers: tuple[int, list[list[int]]] | None = None

    def effort(self, part: str) -> float:
        # A token that is decoded takes far longer than one of a text that is read.
        return 20.0 * len(self._prompts) * self.settings.new_tokens

    def depends_on(self, part: str) -> Mapping[str, Any]:
        return {**self.record(), "prompts": hashlib.sha256("\0".join(self._prompts).encode()).hexdigest()}

    def measure(self, subject: MetricSubject) -> Mapping[str, Any]:
        reference = subject.model if subject.reference is None else subject.reference
        if self._answers is None or self._answers[0] != id(reference):
            # The first model stays in memory, so that its identity is its own.
            self._answers = id(reference), self._of(reference, subject)
        wanted = self._answers[1]
        found = wanted if reference is subject.model else self._of(subject.model, subject)
        answers: list[dict[str, Any]] = []
        for prompt, ours, theirs in zip(self._prompts, found, wanted, strict=True):
            equal = ours == theirs
            same = len(ours) if equal else _common(ours, theirs)
            answers.append(
                {
                    "prompt": prompt,
                    "answer": _text(subject.tokenizer, ours),
                    "first": _text(subject.tokenizer, theirs),
                    "common": _text(subject.tokenizer, ours[:same]),
                    "common_tokens": same,
                    "equal": equal,
                }
            )
        count = len(answers)
        return {
            "prompts": count,
            "equal": sum(one["equal"] for one in answers) / count,
            "common_tokens": sum(one["common_tokens"] for one in answers) / count,
            "answers": answers,
        }

    def _of(self, model: PreTrainedModel, subject: MetricSubject) -> list[list[int]]:
        from ..calibration.chat import Prompt, chat_prompt
        from ..models.generation import generate_ids

        if subject.tokenizer is None:
            raise no_tokenizer(f"model '{subject.name}'", "it cannot read prompts")
        answers = []
        for text in subject.progress.track(self._prompts, "answers"):
            asked, stop = Prompt(text, False), None
            if self.settings.chat and subject.family is not None:
                asked, stop = chat_prompt(subject.family, subject.tokenizer, text), subject.family.stop_text
            answers.append(
                generate_ids(
                    model,
                    subject.tokenizer,
                    asked.text,
                    add_special_tokens=not asked.has_special_tokens,
                    max_new_tokens=self.settings.new_tokens,
                    stop_text=stop,
                )
            )
        return answers

    def rows(self, result: Mapping[str, Any]) -> Sequence[Row]:
        return [
            Row("answers as the first", result["equal"], True),
            Row("tokens before they part", result["common_tokens"], True),
        ]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
