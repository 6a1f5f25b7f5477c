"""Results of ``llmpruner bench``, as frozen values with a JSON form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any


@dataclass(frozen=True, slots=True)
class Measurement:
    """Median of ``runs`` repetitions, with the smallest and the largest of them, and the first and the third
    quartile."""

    median: float
    low: float
    high: float
    runs: int
    lower_quartile: float
    upper_quartile: float


def measurement(values: Sequence[float]) -> Measurement:
    """The `Measurement` of one value or more."""
    quartiles = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Measurement(median(values), min(values), max(values), len(values), quartiles[0], quartiles[2])


@dataclass(frozen=True, slots=True)
class Rate:
    """The speed of one model in one case. ``tokens_per_second``: of all sequences together. ``speedup``: over the first
    model, of runs of the same round. ``ideal``: the speed-up that sizes allow; None where they are not known."""

    tokens_per_second: Measurement
    speedup: Measurement
    ideal: float | None

    @property
    def share(self) -> float | None:
        """The share of the ideal speed-up that is reached: ``speedup / ideal``."""
        return None if self.ideal is None else self.speedup.median / self.ideal

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "share_of_ideal": self.share}


@dataclass(frozen=True, slots=True)
class BenchCase:
    """All models at one batch size and one length of prompt; ``prefill`` and ``decode`` in the order of the models."""

    batch: int
    prompt_tokens: int
    prefill: tuple[Rate, ...]
    decode: tuple[Rate, ...]


@dataclass(frozen=True)
class BenchResult:
    """The speed of several models in one runtime. ``models``: as they were named. ``runtime``: its name, with
    ``settings``. ``facts``: what the times depend on: dtype, device, threads, versions."""

    models: tuple[str, ...]
    runtime: str
    settings: dict[str, Any]
    new_tokens: int
    rounds: int
    facts: dict[str, Any]
    cases: tuple[BenchCase, ...]

    def as_json(self) -> dict[str, Any]:
        """JSON values; each case has ``models``, a list with ``name``, ``prefill`` and ``decode``."""
        cases = [
            {
                "batch": case.batch,
                "prompt_tokens": case.prompt_tokens,
                "models": [
                    {"name": name, "prefill": prefill.as_json(), "decode": decode.as_json()}
                    for name, prefill, decode in zip(self.models, case.prefill, case.decode, strict=True)
                ],
            }
            for case in self.cases
        ]
        return {**{name: getattr(self, name) for name in ("runtime", "settings", "new_tokens", "rounds")}, **self.facts,
                "cases": cases}  # fmt: skip
