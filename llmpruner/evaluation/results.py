"""Results of the measurements of one model, as frozen values with a JSON form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .base import Row
from .speed.results import Measurement
from .task_rows import task_rows, task_values


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """``tokens``: tokens of the text in the windows. Each window of ``window`` tokens gives ``window − 1`` predictions.
    ``bos``: whether windows begin with what the tokenizer puts before a text (one token of the ``window``, as a rule;
    where it puts several, predictions are of text alone). Files of earlier versions do not say so, and were without it.
    ``nll_per_token``: mean negative log-likelihood in nats. ``bits_per_byte`` counts UTF-8 bytes, and is comparable
    between tokenizers. ``kl_per_token``: mean Kullback-Leibler divergence KL(reference ‖ model) of the predictions, in
    nats; None without a reference. ``text_sha256``: of the whole text in UTF-8. ``top1_agreement``: share of the
    predictions whose most probable token is the reference's; None without a reference. ``text``: the name of the text,
    as it was given. ``others``: the results on further texts, by their names, as JSON values of the same keys."""

    perplexity: float
    nll_per_token: float
    bits_per_byte: float
    tokens: int
    windows: int
    window: int
    text_sha256: str
    kl_per_token: float | None = None
    bos: bool = False
    top1_agreement: float | None = None
    text: str | None = None
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Size:
    """Parameters (tied ones once), those in the decoder layers, bytes of the weights in memory, and multiply-accumulate
    operations to decode one token with ``context`` tokens in the cache."""

    parameters: int
    decoder_parameters: int
    weight_bytes: int
    macs_per_token: int
    context: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second at batch size 1. ``peak_bytes``: peak memory of the process (CUDA: of the allocator) while
    measuring, including other models; None where the system does not report it."""

    prefill: Measurement
    decode: Measurement
    prompt_tokens: int
    new_tokens: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one model. ``results``: metric → JSON values by name, which may include infinite numbers;
    those of tasks are with the scores of rows, which `tasks` and `task_rows` give apart. ``rows``: the table's rows, in
    the order of the metrics. ``calibration_overlap``: text or task → share of its passages that the model's calibration
    read (`llmpruner.calibration.passages`), for a model whose record says. Built-in metrics are also typed
    attributes."""

    name: str
    results: Mapping[str, Mapping[str, Any]]
    rows: tuple[Row, ...] = ()
    calibration_overlap: Mapping[str, float] = field(default_factory=dict)

    @property
    def size(self) -> Size | None:
        """None where it was not measured."""
        found = self.results.get("size")
        return None if found is None else Size(**found)

    @property
    def perplexity(self) -> PerplexityResult | None:
        """The result on the first text; None where it was not measured."""
        found = self.results.get("perplexity")
        return None if found is None else PerplexityResult(**found)

    @property
    def perplexities(self) -> Mapping[str, float]:
        """Text → perplexity, for every text that it was measured on."""
        found = self.results.get("perplexity") or {}
        own = {found["text"]: found["perplexity"]} if "text" in found else {}
        return {**own, **{name: one["perplexity"] for name, one in (found.get("others") or {}).items()}}

    @property
    def tasks(self) -> Mapping[str, Mapping[str, float]]:
        """Task → metric → value, as lm-eval names them; empty where no task was run."""
        return task_values(self.results.get("tasks", {}))

    @property
    def task_rows(self) -> Mapping[str, Mapping[str, Any]]:
        """Task → ``sha256``, the checksum of its rows, and ``scores``: metric → the score of every row, in the order of
        the rows. For metrics that are means over rows (accuracy, exact match); their mean is the value in `tasks`.
        Groups of tasks have none, nor have results that earlier versions kept."""
        return task_rows(self.results.get("tasks", {}))

    @property
    def speed(self) -> Speed | None:
        """None where it was not measured."""
        found = self.results.get("speed")
        if found is None:
            return None
        spread = {name: Measurement(**found[name]) for name in ("prefill", "decode")}
        return Speed(**{**found, **spread})

    def as_json(self) -> dict[str, Any]:
        """``name``, the built-in metrics (null, for tasks ``{}``, where not measured), ``calibration_overlap``, the
        other metrics by name, and `task_rows` where there are any. Numbers that are not finite become null."""
        builtin: dict[str, Any] = {"size": None, "perplexity": None, "tasks": {}, "speed": None}
        builtin["calibration_overlap"] = self.calibration_overlap
        rows = {"task_rows": self.task_rows} if self.task_rows else {}
        plain: dict[str, Any] = finite({"name": self.name, **builtin, **self.results, "tasks": self.tasks, **rows})
        return plain


def finite(value: Any) -> Any:
    """``value`` with None in place of all numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
