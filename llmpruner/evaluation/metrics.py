"""The metrics ``size``, ``perplexity``, ``answers`` and ``given-answers``. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import product
from os.path import isfile
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..calibration.conversations import read_examples
from ..calibration.documents import PYDOC, read_text
from ..component import ComponentSettings
from ..errors import DataError, ModelError, SettingsError
from ..files import weights_size
from .evaluate import ComparedModel, Metric, MetricSubject, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.coupling import CouplingGraph

_LOG = logging.getLogger("llmpruner")
_FIRST = 16  # tokens of the first model's answers with which those of others are compared
_RUN, _REPEATED = 4, 0.25  # tokens of a run, and the share of runs above which an answer repeats itself


@dataclass(frozen=True, slots=True)
class Size:
    """Parameters (tied ones once), bytes of weights in memory, and multiply-accumulate operations per decoded token."""

    parameters: int
    decoder_parameters: int
    weight_bytes: int
    macs_per_token: int
    context: int
    """Tokens in the cache when operations are counted."""


def size(model: PreTrainedModel, graph: CouplingGraph, *, context: int = 512) -> Size:
    """The `Size` of ``model``, which may be on the meta device. ``graph``: of the model as it is, after any cut."""
    from ..models.meta import macs_per_token
    from ..models.numbers import stored_bytes

    weight_bytes, macs = sum(map(stored_bytes, model.parameters())), macs_per_token(model, graph, context=context)
    return Size(graph.total_parameters, graph.decoder_parameters, weight_bytes, macs, context)


class SizeMetric(Metric):
    name = "size"
    summary = (
        "parameters, bytes of the weights in memory and in files, and multiply-accumulate operations per decoded token"
    )

    class Settings(ComponentSettings):
        context: int = Field(512, ge=0, description="Tokens in the cache when operations are counted.")

    settings: Settings

    def measure(self, subject: MetricSubject) -> Mapping[str, Any]:
        stored = weights_size(Path(subject.name))
        sizes = asdict(size(subject.model, subject.graph, context=self.settings.context))
        return {**sizes, "file_bytes": stored or None}

    def rows(self, result: Mapping[str, Any]) -> Sequence[Row]:
        labels = {
            "parameters": "parameters", "decoder parameters": "decoder_parameters", "bytes in memory": "weight_bytes",
            "bytes in files": "file_bytes", "MACs per token": "macs_per_token",
        }  # fmt: skip
        return [Row(label, result.get(name), False) for label, name in labels.items()]


class PerplexityMetric(Metric):
    name = "perplexity"
    summary = "perplexity and bits per byte on texts; with kl also the KL divergence from the first model"

    class Settings(ComponentSettings):
        text: str = Field(
            PYDOC,
            description=f"A .txt, .json, .jsonl or .parquet file, a data set, or '{PYDOC}', the text of Python's "
            "help(); several, with commas between them, are measured one by one.",
        )
        window: int = Field(512, ge=2, description="Tokens per window; windows do not overlap.")
        tokens: int | None = Field(
            None, ge=2, description="Number of tokens to use, from the start of each text; all by default."
        )
        kl: bool = Field(
            False,
            description="Also the KL divergence from the first model, and the share of tokens with the same most "
            "probable prediction (both models are in memory).",
        )
        batch_size: int = Field(4, ge=1, description="Windows per batch.")
        autocast: bool = Field(False, description="Compute in bfloat16 under autocast where that is faster (rounds).")

    settings: Settings

    @property
    def needs_reference(self) -> bool:
        return self.settings.kl

    def prepare(self) -> None:
        text = self.settings.text
        names = [text] if isfile(text) else [name.strip() for name in text.split(",")]
        self._texts = {name: read_text(name) for name in names}

    def check_models(self, models: Sequence[ComparedModel]) -> None:
        from ..models.generation import check_table, warn_beyond
        from ..models.tokenizer import tokens_of

        window = self.settings.window
        for model, check in product(models, (check_table, warn_beyond)):
            check(model.config, window, f"windows of {window:,} tokens", "lower --window", f"'{model.name}'")
        starts = [text[:100_000] for text in self._texts.values()]  # enough to compare tokenizers
        for text in starts if self.settings.kl else ():
            _check_same_tokens(models, text)
        if len({len(tokens_of(model.tokenizer, starts[0])) for model in models}) > 1:
            _LOG.warning("the tokenizers differ, and perplexity is per token: compare bits per byte")

    def measure(self, subject: MetricSubject) -> Mapping[str, Any]:
        """The `PerplexityResult` on the first text, named by ``text``; ``others``: on further texts by their names."""
        from .perplexity import perplexity

        options = self.settings.model_dump(exclude={"text", "kl"})
        options |= {"reference": subject.reference if self.settings.kl else None, "progress": subject.progress}
        subjects = subject.model, subject.tokenizer
        results = {name: asdict(perplexity(*subjects, text, **options)) for name, text in self._texts.items()}
        first, *others = results
        return {**results[first], "text": first, "others": {name: results[name] for name in others}}

    def rows(self, result: Mapping[str, Any]) -> Sequence[Row]:
        results = {result["text"]: result, **result["others"]}
        short = [Path(name).name for name in results]
        rows = []
        for (name, values), file in zip(results.items(), short, strict=True):
            where = f", {file if short.count(file) == 1 else name}" if len(results) > 1 else ""
            rows += [
                Row(f"perplexity{where}", values["perplexity"], False),
                Row(f"bits per byte{where}", values["bits_per_byte"], False),
                Row(f"KL to the first{where}", values["kl_per_token"], False),
                Row(f"top-1 as the first{where}", values["top1_agreement"], True),
            ]
        return rows


class AnswersMetric(Metric):
    """The likeliest answers to the 40 instructions of ``instructions.txt``, on which nothing trains or calibrates."""

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
        """``repeat_themselves``, ``cut_off``: shares of answers. ``first_tokens``: how much of the first model's first
        `_FIRST` tokens an answer begins with, a mean of shares. ``texts``: the answers."""
        from ..calibration.chat import chat_prompt, common_start
        from ..calibration.written import answered
        from ..models.generation import text_before
        from ..models.tokenizer import ids_to_continue, tokens_of

        tokenizer, stop = subject.tokenizer, subject.family.chat_format.stop_text
        instructions = (files(__package__) / "instructions.txt").read_text(encoding="utf-8").splitlines()
        chats = [chat_prompt(subject.family, tokenizer, line) for line in instructions]
        prompts = [ids_to_continue(tokenizer, chat.text, special=not chat.has_special_tokens) for chat in chats]
        written = answered(subject.model, tokenizer, prompts, self.settings.tokens)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
        complete = [
            len(ids) < self.settings.tokens or bool(stop and stop in text)
            for ids, text in zip(written, texts, strict=True)
        ]
        answers = [text_before(text, stop).strip() for text in texts]
        if self._first is None:
            self._first = tokenizer, [tokens_of(tokenizer, text)[:_FIRST] for text in answers]
        first_tokenizer, starts = self._first
        pairs = [(start, tokens_of(first_tokenizer, text)) for start, text in zip(starts, answers, strict=True)]
        alike = [common_start(start, ids) / len(start) if start else 1.0 for start, ids in pairs]
        return {
            "repeat_themselves": fmean(repeated(tokens_of(tokenizer, text)) > _REPEATED for text in answers),
            "cut_off": 1 - fmean(complete),
            "first_tokens": fmean(alike),
            "texts": answers,
        }

    def rows(self, result: Mapping[str, Any]) -> Sequence[Row]:
        repeat = Row("answers that repeat", result["repeat_themselves"], False)
        cut_off = Row("answers cut off", result["cut_off"], False)
        return [repeat, cut_off, Row("answers starting as the first", result["first_tokens"], True)]


def repeated(ids: Sequence[int]) -> float:
    """The share of runs of `_RUN` tokens that occur before in ``ids`` (Welleck et al., 2020, seq-rep-4)."""
    runs = [tuple(ids[at : at + _RUN]) for at in range(len(ids) - _RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


class GivenAnswersMetric(Metric):
    """Perplexity of the tokens of answers, each after its question in the model's chat format, as in recovery."""

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
        from ..models.generation import check_table

        cutoff, hint = self.settings.cutoff, f"lower --set {self.name}.cutoff"
        for model in models:
            check_table(model.config, cutoff, f"examples of {cutoff:,} tokens", hint, f"'{model.name}'")
        if self.settings.kl:
            _check_same_tokens(models, "\n".join(str(example) for _, example in self._examples[:64]))

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
        kl = Row("KL to the first, answers", result["kl_per_token"], False)
        return [Row("perplexity of answers", result["perplexity"], False), kl]


def _check_same_tokens(models: Sequence[ComparedModel], text: str) -> None:
    """Raise `ModelError` where vocabularies differ, unless another is a part of the first. Tokens are compared for the
    other's ids of ``text``, as a fast and a slow tokenizer of one vocabulary do not split every text alike."""
    from ..models.tokenizer import tokens_of
    from ..models.vocabulary import old_ids

    first, *others = models
    for other in others:
        sizes = [getattr(model.config.get_text_config(), "vocab_size", 0) for model in (first, other)]
        ids = sorted(set(tokens_of(other.tokenizer, text)))
        tokens = other.tokenizer.convert_ids_to_tokens(ids)
        same = sizes[0] == sizes[1] and first.tokenizer.convert_ids_to_tokens(ids) == tokens
        if not same and (sizes[0] < sizes[1] or old_ids(first.tokenizer, other.tokenizer) is None):
            raise ModelError(
                f"the vocabularies of '{first.name}' and '{other.name}' differ; KL divergence needs one vocabulary: "
                "compare models with the same tokenizer, name the dense model before a trimmed one, or leave kl out"
            )
