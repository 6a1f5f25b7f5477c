"""Quality for size: model × method × shape × ratio × calibration text on real models, without training.

    LLMPRUNER_DATA=… LLMPRUNER_MODELS=… python -m benchmarks.quality [--only TEXT …] [--models demo]
    python -m benchmarks.quality --render

Every row is one `llmpruner prune` in a process of its own, then perplexity, and the divergence from the dense model, on
texts that no calibration has seen: WikiText-2's test part, documents of C4, answers to instructions in the model's chat
format and as plain text, and code. Rows are kept in ``results/quality.jsonl``, so that an interrupted run goes on where
it stopped. The tables of ``docs/quality.md`` and the README are made of them (``--render``: nothing is measured).
"""

from __future__ import annotations

import argparse
import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from . import real_models
from .measure import TOKENS, WINDOW, as_json, data_folder, instructions, machine, run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality.jsonl"
PAGE, README = ROOT / "docs" / "quality.md", ROOT / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
MODELS: dict[str, Callable[[], str]] = {
    "SmolLM2-135M-Instruct": lambda: "demo",
    "Qwen2.5-Coder-0.5B-Instruct": lambda: str(real_models.qwen()),
}
CALIBRATION = {"self-written": "self", "C4": "{c4}", "WikiText-2": "{wikitext}", "C4 and self-written": "{c4},self"}
_SAMPLES = ("--samples", "64", "--set", "prune.length=512")
METHODS = {
    "best": ("--method", "best"),
    "fast": ("--method", "fast"),
    "llm-pruner": ("--method", "llm-pruner"),
    "best by energy": ("--method", "best", "--importance", "energy"),
    "Wanda-sp": ("--importance", "wanda-sp", *_SAMPLES),
    "FLAP": ("--importance", "flap", "--set", "prune.allocation=global", "--set", "global.normalize=zscore", *_SAMPLES),
    "ShortGPT": ("--importance", "block-influence", "--kinds", "layer", "--set", "prune.layers=all", *_SAMPLES),
}
"""The last three are our implementations of the criteria of other papers, with what goes with them there."""
COLUMNS = {
    "WikiText-2": "WikiText-2",
    "C4": "C4",
    "answers": "answers in chat",
    "instructions": "answers",
    "code": "code",
}
"""Text → the heading of its column."""
C4_JUDGED = slice(150, 200)
"""Documents of the C4 sample that are measured; no row is calibrated on them."""
CODE = ("argparse", "ast", "dataclasses", "difflib", "inspect", "pathlib", "tarfile", "typing")
"""Modules of Python's standard library."""


@dataclass(frozen=True)
class Row:
    """One result. ``method``: of `METHODS`, or "dense" with ratio 0. ``text``: of `CALIBRATION`. ``samples``: of the
    calibration; 0 for the method's own number."""

    model: str
    method: str = "dense"
    ratio: float = 0.0
    shape: str = ""
    text: str = ""
    samples: int = 0


def rows() -> Iterator[Row]:
    demo, qwen = MODELS
    yield Row(demo)
    for ratio in (0.2, 0.1, 0.3, 0.5):
        yield Row(demo, "best", ratio, "uniform", "self-written")
    for method in ("fast", "llm-pruner", "best by energy"):
        yield Row(demo, method, 0.2, "uniform", "self-written")
    for shape, text in (("uniform", "C4 and self-written"), ("uniform", "WikiText-2"), ("free", "WikiText-2")):
        yield Row(demo, "best", 0.2, shape, text)
    yield Row(qwen)
    for ratio in (0.2, 0.3):
        for method, shape in (("best", "uniform"), ("best by energy", "uniform"), ("best", "free")):
            yield Row(qwen, method, ratio, shape, "C4", samples=64)
        for method, shape in (("llm-pruner", "free"), ("Wanda-sp", "uniform"), ("FLAP", "free"), ("ShortGPT", "")):
            yield Row(qwen, method, ratio, shape, "C4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--only", nargs="*", default=[""], help="measure only the rows that hold one of these words")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each text; fewer answers in the same proportion")
    parser.add_argument("--render", action="store_true", help="only write the tables")
    options = parser.parse_args()
    for row in rows() if not options.render else ():
        done = read()
        if row in done or row.model not in options.models or not any(word in str(row) for word in options.only):
            continue
        with tempfile.TemporaryDirectory() as work:
            done[row] = measure(row, data_folder(), Path(work), options.tokens)
        RESULTS.write_text("".join(json.dumps(entry) + "\n" for entry in done.values()), encoding="utf-8")
        print(row, as_json(done[row]), flush=True)
    PAGE.write_text(page(read()), encoding="utf-8")
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{overview(read())}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def read() -> dict[Row, dict[str, Any]]:
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.is_file() else []
    return {Row(**entry["row"]): entry for entry in map(json.loads, lines)}


def measure(row: Row, data: Path, work: Path, tokens: int) -> dict[str, Any]:
    dense = model = MODELS[row.model]()
    found: dict[str, Any] = {"row": vars(row), "tokens": tokens, "machine": machine()}
    if row.method != "dense":
        model = str(work / "pruned")
        found |= prune(row, dense, data, work, model)
    return found | {"texts": measured_on(dense, model, data, work, tokens)}


def prune(row: Row, dense: str, data: Path, work: Path, output: str) -> dict[str, Any]:
    """Write the pruned model of a row; its size, time and memory."""
    files = {"wikitext": data / "wikitext2_unk_validation.jsonl", "c4": work / "c4.jsonl"}
    documents = (data / "c4_sample_300.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    judged = set(range(len(documents))[C4_JUDGED])
    files["c4"].write_text("".join(line for n, line in enumerate(documents) if n not in judged), encoding="utf-8")
    options = [*METHODS[row.method], "--ratio", str(row.ratio), "--calibration", CALIBRATION[row.text].format(**files)]
    options += ["--shape", row.shape] if row.shape else []
    options += ["--samples", str(row.samples)] if row.samples else []
    done = run("prune", dense, *options, "--dtype", "float32", "-o", output, "--json", timeout=7200)
    took = {key: done[key] for key in ("seconds", "cpu_seconds", "peak_mib")}
    return {**took, "decoder_removed": json.loads(done["output"])["result"]["decoder_removed"]}


def measured_on(dense: str, model: str, data: Path, work: Path, tokens: int) -> dict[str, dict[str, float]]:
    """Text → perplexity, and the divergence from the dense model (0 for that itself), in nats per token."""
    documents = (data / "c4_sample_300.jsonl").read_text(encoding="utf-8").splitlines()[C4_JUDGED]
    texts = {
        "WikiText-2": (data / "wikitext2_unk_test.txt").read_text(encoding="utf-8"),
        "C4": "\n\n".join(json.loads(line)["text"] for line in documents),
        "instructions": instructions(data),
        "code": "\n\n".join(inspect.getsource(import_module(name)) for name in CODE),
    }
    files = {name: work / f"{name}.txt" for name in texts}
    for name, file in files.items():
        file.write_text(texts[name], encoding="utf-8")
    settings = {
        "perplexity.tokens": tokens, "perplexity.window": WINDOW, "perplexity.autocast": True,
        "given-answers.data": data / "alpaca_gpt4_en_999.jsonl", "given-answers.limit": tokens // 100,
        "given-answers.autocast": True,
    }  # fmt: skip
    models = (model,) if model == dense else (dense, model, "--kl", "--set", "given-answers.kl=true")
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    report = work / "evaluation.json"
    run(
        "evaluate", *models, "--dtype", "float32", "--perplexity", ",".join(map(str, files.values())),
        "--metrics", "given-answers", *options, "--json", str(report),
    )  # fmt: skip
    found = json.loads(report.read_text())[-1]
    of_texts = {str(files["WikiText-2"]): found["perplexity"], **found["perplexity"]["others"]}
    results = {name: of_texts[str(file)] for name, file in files.items()} | {"answers": found["given-answers"]}
    return {name: {"perplexity": one["perplexity"], "kl": one["kl_per_token"] or 0.0} for name, one in results.items()}


def overview(done: dict[Row, dict[str, Any]]) -> str:
    """The README's table: the first model at 20 %."""
    model = next(iter(MODELS))
    return "\n".join(table({row: entry for row, entry in done.items() if row.model == model and row.ratio in (0, 0.2)}))


def page(done: dict[Row, dict[str, Any]]) -> str:
    """``docs/quality.md``"""
    lines = [
        "# Quality for size",
        "",
        "<!-- Written by benchmarks/quality.py; do not edit. -->",
        "",
        "Models after the cut, without training. Each text has its perplexity and, in parentheses, the mean divergence "
        f"(KL) from the dense model per token, in nats: the first tokens in windows of {WINDOW}. None was used for "
        "calibration: WikiText-2's test part, documents of C4, answers to instructions (after the instruction in the "
        "model's chat format, and as plain text), and modules of Python's standard library. *Uniform*: every layer has "
        "one width; *free*: the layers of both ends stay whole. FLAP, Wanda-sp and ShortGPT are this project's "
        "implementations of those papers' criteria.",
    ]
    for model in MODELS:
        chosen = {row: entry for row, entry in done.items() if row.model == model}
        if chosen:
            tokens = chosen[Row(model)]["tokens"]
            lines += ["", f"## {model}", "", f"{tokens:,} tokens of each text.", "", *table(chosen)]
    return "\n".join([*lines, ""])


def table(done: dict[Row, dict[str, Any]]) -> Sequence[str]:
    heads = ("method", "shape", "calibrated on", "removed", *COLUMNS.values())
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row, entry in sorted(done.items(), key=lambda item: (item[0].ratio, list(rows()).index(item[0]))):
        texts = [entry["texts"][name] for name in COLUMNS]
        cells = [f"{one['perplexity']:.2f}" + (f" ({one['kl']:.3f})" if one["kl"] else "") for one in texts]
        about = [row.method, row.shape or "–", row.text or "–", f"{entry.get('decoder_removed', 0):.1%}"]
        lines.append(f"| {' | '.join([*about, *cells])} |")
    return lines


if __name__ == "__main__":
    main()
