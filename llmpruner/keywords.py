"""Settings as typed keywords. Written by docs/_tools from `llmpruner.settings`; do not edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from typing_extensions import Required


class LoadKeywords(TypedDict, total=False):
    family: str | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    device: str
    revision: str | None
    trust_remote_code: bool


class PruneKeywords(TypedDict, total=False):
    budget: str
    target_params: str | float | None
    unit_ratio: float | None
    kinds: str | Sequence[str]
    layers: str | Sequence[int] | None
    shape: Literal["uniform", "free"]
    round_to: int | None
    method: str | None
    importance: str | None
    reduction: Literal["sum", "mean", "max", "prod", "last"]
    allocation: str
    steps: int
    compensate: str | None
    calibration: str | Path
    samples: int | None
    length: int | None
    seed: int
    settings: Mapping[str, Mapping[str, Any]]


class RecoverKeywords(TypedDict, total=False):
    data: str | Path
    strategy: str
    limit: int | None
    learning_rate: float | None
    epochs: float
    max_steps: int | None
    minutes: float | None
    batch_size: int | None
    micro_batch_size: int
    sharded: bool | None
    cutoff: int
    validation: float
    seed: int
    settings: Mapping[str, Mapping[str, Any]]


class EvaluateKeywords(TypedDict, total=False):
    perplexity: str | Path | None
    window: int | None
    kl: bool
    tasks: str | Sequence[str] | None
    limit: int | None
    metrics: str | Sequence[str] | None
    settings: Mapping[str, Mapping[str, Any]]


class BenchKeywords(TypedDict, total=False):
    runtime: str
    batch: str | int | Sequence[int]
    prompt: str | int | Sequence[int]
    new: int
    rounds: int
    settings: Mapping[str, Mapping[str, Any]]


class GenerateKeywords(TypedDict, total=False):
    chat: bool
    max_new_tokens: int
    temperature: float
    seed: int


class ExportKeywords(TypedDict, total=False):
    to: Required[str]
    settings: Mapping[str, Mapping[str, Any]]
