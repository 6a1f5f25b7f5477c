"""The rows of the benchmark `quality`: what is measured, and what was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from . import real_models

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
SHAPES = ("uniform", "free")
TEXTS = {
    "self-generated": "self",
    "C4 and self-generated": "{c4},self",
    "C4 sample": "{c4}",
    "WikiText-2 validation": "{wikitext}",
}
"""Calibration, the default first."""
METHODS = ("best", "fast", "llm-pruner", "best by energy")
_SAMPLES = ("--samples", "64", "--length", "512")
OPTIONS = {
    "best by energy": ("--method", "best", "--importance", "energy"),
    "best, search": ("--method", "best", "--allocation", "search"),
    "Wanda-sp": ("--importance", "wanda-sp", *_SAMPLES),
    "FLAP": ("--importance", "flap", "--allocation", "global", "--normalize", "zscore", *_SAMPLES),
    "ShortGPT": ("--importance", "block-influence", "--layers", "all", *_SAMPLES),
}  # fmt: skip
"""Of rows that are no method's name: `best` with the criterion that it had before, and with shares that are
moved between groups by measured divergence, heads and MLP compared; and our implementations of the criteria of
other papers, with what goes with them there: FLAP with one ranking of standardized scores, though without its biases,
which these models do not have; ShortGPT with whole layers."""
COMPARED = (
    ("best", "uniform", "mlp", "C4 sample"),
    ("best", "uniform", "mlp,attention", "C4 sample"),
    ("best", "free", "mlp", "C4 sample"),
    ("best, search", "free", "mlp", "C4 sample"),
    ("best, search", "free", "mlp,attention", "C4 sample"),
    ("best", "uniform", "mlp", "self-generated"),
    ("fast", "uniform", "mlp", "self-generated"),
    ("llm-pruner", "free", "mlp", "self-generated"),
    ("llm-pruner", "free", "mlp", "C4 sample"),
    ("Wanda-sp", "uniform", "mlp", "C4 sample"),
    ("FLAP", "free", "mlp", "C4 sample"),
    ("ShortGPT", "free", "layer", "C4 sample"),
)
"""Method, shape, kinds and calibration text of the rows that every model has."""
MODELS: dict[str, Callable[[], str]] = {
    "demo": lambda: "demo",
    "Qwen2.5-Coder-0.5B-Instruct": lambda: str(real_models.qwen()),
}
NAMES = {"demo": "SmolLM2-135M-Instruct"}


@dataclass(frozen=True)
class Row:
    """One point. ``text``: what the pruned model was calibrated on; the dense model has ratio 0 and no method.
    ``shape``: of the result; free in the results of version 0.1, which knew no other. ``kinds``: that may be removed.
    ``model``: of `MODELS`, or a checkpoint. ``samples``: of the calibration; 0 for the method's own number."""

    method: str
    ratio: float
    text: str
    shape: str = "free"
    kinds: str = "mlp"
    model: str = "demo"
    samples: int = 0

    @property
    def key(self) -> str:
        key = f"{self.method} {self.ratio:g} {self.text} {self.shape}"
        defaults = {one.name: one.default for one in fields(self)}
        more = (getattr(self, name) for name in ("kinds", "model", "samples") if getattr(self, name) != defaults[name])
        return " ".join([key, *map(str, more)])


def rows(ratios: tuple[float, ...], models: Sequence[str]) -> Iterator[Row]:
    for model in models:
        yield Row("dense", 0.0, "", model=model)
        for ratio in (ratio for ratio in (0.2, 0.3) if ratio in ratios):
            for method, shape, kinds, text in COMPARED:
                yield Row(method, ratio, text, shape, kinds, model)
    if "demo" not in models:
        return
    # The row that says most comes first, should the run be cut short.
    for text in TEXTS:
        for method in METHODS:
            for ratio in sorted(ratios, key=lambda r: abs(r - 0.2)):
                for shape in SHAPES:
                    yield Row(method, ratio, text, shape)


def points_of(done: dict[str, dict[str, Any]], model: str = "demo") -> list[dict[str, Any]]:
    """What was measured of pruned models, in the order of the tables."""
    points = [entry for entry in done.values() if row_of(entry).model == model and row_of(entry).method != "dense"]

    def place(entry: dict[str, Any]) -> tuple[Any, ...]:
        row = row_of(entry)
        return row.shape == "free", row.ratio, list(TEXTS).index(row.text), row.method, row.kinds

    return sorted(points, key=place)


def row_of(entry: dict[str, Any]) -> Row:
    return Row(**entry["row"])


def read_results() -> dict[str, dict[str, Any]]:
    if not RESULTS.is_file():
        return {}
    found = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return {Row(**entry["row"]).key: entry for entry in found}
