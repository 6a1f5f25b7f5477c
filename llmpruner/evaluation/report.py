"""What evaluation returns: frozen values that turn into JSON, and the table that sets several models side by
side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """``tokens``: tokens in the windows. Each window of ``window`` tokens gives ``window − 1`` predictions.
    ``nll_per_token`` is in nats; ``bits_per_byte`` counts UTF-8 bytes, and is comparable between tokenizers.
    ``kl_per_token``: mean Kullback-Leibler divergence of the predictions from a reference model's, in nats; None
    where there was no reference. ``text_sha256`` tells which text this was."""

    perplexity: float
    nll_per_token: float
    bits_per_byte: float
    tokens: int
    windows: int
    window: int
    text_sha256: str
    kl_per_token: float | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """Median of ``runs`` repetitions, with the least and the greatest of them."""

    median: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True, slots=True)
class Size:
    """Parameters (tied ones once), the part of them below the decoder layers, bytes of the weights in memory,
    and multiply-accumulate operations to decode one token with ``context`` tokens in the cache."""

    parameters: int
    decoder_parameters: int
    weight_bytes: int
    macs_per_token: int
    context: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second at batch size 1. ``peak_bytes``: the most memory the process (CUDA: the allocator)
    held while measuring, other models in it included; None where the system cannot tell."""

    prefill: Measurement
    decode: Measurement
    prompt_tokens: int
    new_tokens: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Evaluation:
    """One model's row of a report. ``tasks``: task → metric → value, as lm-eval names them."""

    name: str
    size: Size | None = None
    perplexity: PerplexityResult | None = None
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    speed: Speed | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; a number that is not finite, which JSON cannot say, becomes None."""
        plain: dict[str, Any] = _finite(asdict(self))
        return plain


@dataclass(frozen=True, slots=True)
class Line:
    """One quantity over all models; None where a model lacks it. ``higher_is_better`` is None for neither."""

    label: str
    values: tuple[float | None, ...]
    higher_is_better: bool | None
    errors: tuple[float | None, ...] = ()


def side_by_side(evaluations: Sequence[Evaluation]) -> list[Line]:
    """The quantities that at least one of ``evaluations`` has, each over all of them, in a fixed order."""
    lines = [
        _line("parameters", False, [e.size.parameters if e.size else None for e in evaluations]),
        _line("decoder parameters", False, [e.size.decoder_parameters if e.size else None for e in evaluations]),
        _line("weight bytes", False, [e.size.weight_bytes if e.size else None for e in evaluations]),
        _line("MACs per token", False, [e.size.macs_per_token if e.size else None for e in evaluations]),
        _line("perplexity", False, [e.perplexity.perplexity if e.perplexity else None for e in evaluations]),
        _line(
            "bits per byte",
            False,
            [e.perplexity.bits_per_byte if e.perplexity else None for e in evaluations],
        ),
        _line("KL to the first", False, [e.perplexity.kl_per_token if e.perplexity else None for e in evaluations]),
        _line("prefill tokens/s", True, [e.speed.prefill.median if e.speed else None for e in evaluations]),
        _line("decode tokens/s", True, [e.speed.decode.median if e.speed else None for e in evaluations]),
        _line("peak memory bytes", False, [e.speed.peak_bytes if e.speed else None for e in evaluations]),
    ]
    names = dict.fromkeys(
        (task, metric) for e in evaluations for task, metrics in e.tasks.items() for metric in metrics
    )
    for task, metric in names:
        if metric.endswith("_stderr"):
            continue
        values = [e.tasks.get(task, {}).get(metric) for e in evaluations]
        errors = [e.tasks.get(task, {}).get(f"{metric}_stderr") for e in evaluations]
        better = True if metric.startswith(("acc", "exact_match", "f1")) else None
        better = False if metric in ("word_perplexity", "byte_perplexity", "bits_per_byte") else better
        lines.append(Line(f"{task} {metric}", tuple(values), better, tuple(errors)))
    return [line for line in lines if any(value is not None for value in line.values)]


def _line(label: str, higher_is_better: bool, values: Sequence[float | None]) -> Line:
    return Line(label, tuple(values), higher_is_better)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
