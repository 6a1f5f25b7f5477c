"""The built-in metrics and their settings; the measurements are in `cost`, `perplexity` and `tasks`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..calibration.documents import PYDOC, read_text, shortened
from ..component import ComponentSettings
from ..errors import DataError, SettingsError, no_tokenizer
from ..files import is_file
from ..settings import Seed
from ..values import Names
from .base import ComparedModel, Metric, MetricSubject, Row
from .comparable import check_one_vocabulary, check_same_tokens
from .task_rows import task_rows, task_values, with_task_rows
from .tasks import LoadedTasks, evaluate_tasks, load_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .results import PerplexityResult


_OPENING = 64
"""More tokens than any tokenizer puts before a text."""
_COMPARED = 100_000
"""Characters from the start of a text by which tokenizers are compared."""


class SizeMetric(Metric):
    """Computed from shapes alone; see `llmpruner.evaluation.cost.size`."""

    name = "size"
    summary = "parameters, bytes of the weights, and multiply-accumulate operations per decoded token"

    class Settings(ComponentSettings):
        context: int = Field(512, ge=0, description="Tokens in the cache when operations are counted.")

    settings: Settings

    def measure(self, subject: MetricSubject) -> Mapping[str, Any]:
        from .cost import size

        return asdict(size(subject.model, subject.graph, context=self.settings.context))

    def depends_on(self, part: str) -> Mapping[str, Any]:
        return self.record()

    def rows(self, result: Mapping[str, Any]) -> Sequence[Row]:
        return [
            Row("parameters", result["parameters"], False),
            Row("decoder parameters", result["decoder_parameters"], False),
            Row("weight bytes", result["weight_bytes"], False),
            Row("MACs per token", result["macs_per_token"], False),
        ]


class PerplexityMetric(Metric):
    """Perplexity on one or several texts, with ``kl`` also the divergence from the first model; see
    `llmpruner.evaluation.perplexity.perplexity`. The parts are the texts."""

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
        autocast: bool = Field(False, description="Compute in bfloat16 under autocast (faster, rounds).")
        bos: bool = Field(
            True,
            description="Begin every window with the tokens that the tokenizer puts before a text (BOS), where it puts "
            "any; they are not predicted.",
        )

    settings: Settings

    @property
    def needs_reference(self) -> bool:
        return self.settings.kl

    @cached_property
    def _texts(self) -> dict[str, str]:
        """Name → text, read on first use."""
        return {name: read_text(name) for name in self.parts()}

    def parts(self) -> Sequence[str]:
        given = self.settings.text
        names = [given] if is_file(given) else [name.strip() for name in given.split(",")]
        if len(set(names)) < len(names):
            raise SettingsError(f"{self.label()}: text = {given} names a text twice; its results would have one name")
        return names

    def texts(self) -> Mapping[str, str]:
        return self._texts

    def prepare(self) -> None:
        tokens, window = self.settings.tokens, self.settings.window
        if tokens is not None and tokens < window:
            raise SettingsError(
                f"{self.label()}: tokens = {tokens} is refused: expected at least one window of {window}"
            )
        for name, text in self._texts.items():
            # A token is a byte at least, but for a few that tokenizers put before a text.
            size = len(text.encode())
            if size + _OPENING < (tokens or window):
                wanted = f"the {tokens:,} tokens asked for" if tokens else f"a window of {window:,} tokens"
                raise DataError(f"{name} has {size:,} bytes, fewer than {wanted}")

    def check_model(self, ref: str, config: PreTrainedConfig) -> None:
        from ..models.position_tables import check_table_of_config, warn_beyond
        from .perplexity import beyond

        self.prepare()  # what is refused needs no warning
        window = self.settings.window
        check_table_of_config(config, ref, window, *beyond(window))
        warn_beyond(config, ref, window, *beyond(window))

    def check_pair(self, first: ComparedModel, other: ComparedModel) -> None:
        from ..models.tokens import tokens_of

        check_one_vocabulary(first, other)
        for text in self._texts.values():
            begin = text[:_COMPARED]
            check_same_tokens(first, other, [tokens_of(one.tokenizer, begin) for one in (first, other)])

    def effort(self, part: str) -> float:
        # A token of a text in English has about four bytes.
        return min(self.settings.tokens or math.inf, len(self._texts[part]) / 4) * (2 if self.settings.kl else 1)

    def depends_on(self, part: str) -> Mapping[str, Any]:
        text = self._texts[part]
        return {**self.record(), "text": hashlib.sha256(text.encode()).hexdigest()}

    def measure_part(self, subject: MetricSubject, part: str) -> Mapping[str, Any]:
        from .perplexity import perplexity

        settings = self.settings
        found: PerplexityResult = perplexity(
            subject.model,
            _tokenizer(self, subject),
            self._texts[part],
            window=settings.window,
            tokens=settings.tokens,
            batch_size=settings.batch_size,
            autocast=settings.autocast,
            bos=settings.bos,
            reference=subject.reference if settings.kl else None,
            progress=subject.progress,
        )
        return asdict(found)

    def joined(self, results: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
        # Names are not part of what is kept: a text is known by its content.
        first, *others = self.parts()
        further = {name: {k: v for k, v in results[name].items() if k not in ("text", "others")} for name in others}
        return {**results[first], "text": first, "others": further}

    def rows(self, result: Mapping[str, Any]) -> Sequence[Row]:
        # A page about results of another run knows its text from the result alone.
        first = result.get("text") or self.parts()[0]
        several = result.get("others") or {}
        rows = []
        names = shortened([first, *several])
        for name, one in {first: result, **several}.items():
            where = f", {names[name]}" if several else ""
            rows += [
                Row(f"perplexity{where}", one["perplexity"], False),
                Row(f"bits per byte{where}", one["bits_per_byte"], False),
                Row(f"KL to the first{where}", one["kl_per_token"], False),
                Row(f"top-1 as the first{where}", one.get("top1_agreement"), True),
            ]
        return rows


class SpeedMetric(Metric):
    """Timed on random tokens at batch size 1; see `llmpruner.evaluation.cost.speed`."""

    name = "speed"
    summary = "tokens per second of prefill and of decoding, and peak memory, at batch size 1"

    class Settings(ComponentSettings):
        prompt_tokens: int = Field(256, ge=1, description="Tokens of the prompt.")
        new_tokens: int = Field(32, ge=1, description="Tokens decoded after it.")
        runs: int = Field(5, ge=1, description="Repetitions, after one that is not counted.")
        seed: Seed = 0

    settings: Settings

    def check_model(self, ref: str, config: PreTrainedConfig) -> None:
        from ..models.position_tables import check_table_of_config
        from .cost import beyond

        counts = self.settings.prompt_tokens, self.settings.new_tokens
        check_table_of_config(config, ref, sum(counts), *beyond(*counts))

    def measure(self, subject: MetricSubject) -> Mapping[str, Any]:
        from .cost import speed

        return asdict(speed(subject.model, progress=subject.progress, **dict(self.settings)))

    def rows(self, result: Mapping[str, Any]) -> Sequence[Row]:
        return [
            Row("prefill tokens/s", result["prefill"]["median"], True),
            Row("decode tokens/s", result["decode"]["median"], True),
            Row("peak memory bytes", result["peak_bytes"], False),
        ]


class TasksMetric(Metric):
    """Tasks of lm-evaluation-harness, which are the parts; see `llmpruner.evaluation.tasks.evaluate_tasks`."""

    name = "tasks"
    summary = "benchmark tasks of lm-evaluation-harness; by default the seven of LLM-Pruner, table 1"

    class Settings(ComponentSettings):
        names: Names = Field(
            ("paper",),
            description="lm-eval tasks, groups or patterns, comma-separated; 'paper' is LLM-Pruner's seven: boolq, "
            "piqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa.",
        )
        limit: int | None = Field(None, ge=1, description="Rows per task; all by default.")
        num_fewshot: int | None = Field(
            None, ge=0, description="Examples shown in each task's prompt; by default the task's own number, mostly 0."
        )
        include_path: Path | None = Field(
            None, description="Folder with additional lm-eval task files, such as for offline data."
        )
        batch_size: int = Field(8, ge=1, description="Rows per batch.")
        seed: Seed = 0

    settings: Settings

    @cached_property
    def tasks(self) -> LoadedTasks:
        """The tasks with their data, loaded on first use."""
        return load_tasks(self.settings.names, include_path=self.settings.include_path)

    def prepare(self) -> None:
        _ = self.tasks

    def parts(self) -> Sequence[str]:
        return self.tasks.names

    def effort(self, part: str) -> float:
        # About four answers of fifty tokens with their question.
        return 200.0 * self.tasks.rows(part, self.settings.limit) * (1 + (self.settings.num_fewshot or 0))

    def depends_on(self, part: str) -> Mapping[str, Any]:
        own = {key: value for key, value in self.record().items() if key not in ("names", "include_path")}
        return {**own, "task": self.tasks.identity(part, self.settings.limit, self.settings.num_fewshot)}

    def texts(self) -> Mapping[str, str]:
        return {part: self.tasks.text(part, self.settings.limit) for part in self.parts()}

    def measure_part(self, subject: MetricSubject, part: str) -> Mapping[str, Any]:
        settings = self.settings
        found = evaluate_tasks(
            subject.model,
            _tokenizer(self, subject),
            self.tasks.only(part),
            limit=settings.limit,
            batch_size=settings.batch_size,
            num_fewshot=settings.num_fewshot,
            seed=settings.seed,
            progress=subject.progress,
        )
        return with_task_rows(found, {name: asdict(rows) for name, rows in found.rows.items()})

    def rows(self, result: Mapping[str, Any]) -> Sequence[Row]:
        rows = []
        for task, values in task_values(result).items():
            scored = task_rows(result).get(task, {})
            for name, value in values.items():
                if not name.endswith("_stderr"):
                    row = Row(f"{task} {name}", value, _higher_is_better(name), values.get(f"{name}_stderr"))
                    scores = scored.get("scores", {}).get(name)
                    rows.append(row if scores is None else replace(row, scores=tuple(scores), scored=scored["sha256"]))
        return rows


def _higher_is_better(metric: str) -> bool | None:
    """For a name of a metric of lm-eval; None for unknown ones."""
    if metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        return False
    return True if metric.startswith(("acc", "exact_match", "f1")) else None


def _tokenizer(metric: Metric, subject: MetricSubject) -> Any:
    if subject.tokenizer is None:
        raise no_tokenizer(f"model '{subject.name}'", f"its {metric.name} cannot be measured")
    return subject.tokenizer
