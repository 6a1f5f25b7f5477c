"""Tiny checkpoints, and files of results about them, for tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_models

import llmpruner

TEXT = "The quick brown fox jumps over the lazy dog, and Paris is the capital of France. " * 20
SHA = "5" * 64


def perplexity(value: float, kl: float) -> dict[str, Any]:
    return {
        "perplexity": value, "nll_per_token": 3.0, "bits_per_byte": 1.0, "tokens": 4096, "windows": 16, "window": 256,
        "text_sha256": SHA, "kl_per_token": kl, "top1_agreement": None, "text": "wikitext2", "others": {},
    }  # fmt: skip


EVALUATED = {
    "dense": {"perplexity": perplexity(20.0, 0.0)},
    "small": {"perplexity": perplexity(30.0, 0.4)},
    "smaller": {"perplexity": perplexity(50.0, 0.9)},
    "worse": {"perplexity": perplexity(60.0, 1.1)},
}
"""Model → what ``evaluate --json`` writes. ``worse`` has the size of ``small``."""


def build(folder: Path) -> Path:
    """``dense``, pruned by 20 % with a repair (``small``) and without (``worse``), and by 40 % (``smaller``)."""
    tiny_models.llama(layers=3).save_pretrained(folder / "dense")
    tiny_models.tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    text = {"calibration": str(folder / "text.txt"), "samples": 8, "length": 24}
    load = llmpruner.LoadSettings(dtype="float32")
    llmpruner.prune(folder / "dense", ratio=0.2, output=folder / "small", load=load, **text)
    llmpruner.prune(folder / "dense", ratio=0.2, importance="l1", output=folder / "worse")
    llmpruner.prune(folder / "dense", ratio=0.4, importance="l1", output=folder / "smaller")
    return folder


def evaluated(places: Path, *names: str) -> list[dict[str, Any]]:
    return [{"name": str(places / name), **EVALUATED[name]} for name in ("dense", *names)]


def benched(places: Path, name: str) -> dict[str, Any]:
    """What ``bench --json`` writes of ``dense`` and another model."""

    def rate(value: float, speedup: float, ideal: float) -> dict[str, Any]:
        around = {"low": 0.0, "high": 0.0, "runs": 3, "lower_quartile": value - 1, "upper_quartile": value + 1}
        return {
            "tokens_per_second": {"median": value, **around}, "speedup": {"median": speedup, **around}, "ideal": ideal,
            "share_of_ideal": speedup / ideal,
        }  # fmt: skip

    models = [
        {"name": str(places / "dense"), "prefill": rate(500, 1, 1), "decode": rate(20, 1, 1)},
        {"name": str(places / name), "prefill": rate(550, 1.1, 1.2), "decode": rate(25, 1.25, 1.5)},
    ]
    case = {"batch": 1, "prompt_tokens": 128, "models": models}
    return {"runtime": "transformers", "settings": {}, "new_tokens": 16, "rounds": 3, "cases": [case]}


def page_of(
    places: Path, tmp_path: Path, *names: str, catalog: llmpruner.Catalog | None = None
) -> tuple[str, dict[str, str]]:
    """The page about ``names``, with results of all and the speed of the first, and its sentences. No warnings."""
    (tmp_path / "quality.json").write_text(json.dumps(evaluated(places, *names)))
    (tmp_path / "speed.json").write_text(json.dumps(benched(places, names[0])))
    made = llmpruner.write_report(
        [places / name for name in names], tmp_path / "page.html",
        results=[tmp_path / "quality.json", tmp_path / "speed.json"], catalog=catalog,
    )  # fmt: skip
    assert made.warnings == ()
    return made.path.read_text(encoding="utf-8"), dict(made.sentences)
