"""Quality for size: real models pruned by this project's methods and by those of other papers.

    LLMPRUNER_DATA=… LLMPRUNER_MODELS=… python -m benchmarks.quality [--only TEXT …] [--again]
    python -m benchmarks.quality --render

Every row is one `llmpruner prune` in a process of its own, then perplexity, and the divergence from the dense model, on
texts that no calibration has seen: WikiText-2's test part, documents of C4, answers to instructions in the model's chat
format and as plain text, and code; and what the model answers to 40 instructions. Rows are kept in
``results/quality.jsonl`` with their commit, so that an interrupted run goes on where it stopped; ``--again`` measures
rows a second time, on another day or machine, into a file of their own. Tables and picture of ``docs/quality.md`` and
the README are made of them (``--render``: nothing is measured).
"""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any

from . import real_models
from .measure import as_json, data_folder, evaluated, instructions, machine, run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality.jsonl"
AGAIN = RESULTS.with_name("quality_again.jsonl")
PAGE = ROOT / "docs" / "quality.md"
PICTURE = ROOT / "docs" / "pictures" / "quality.svg"
MODELS = {
    "SmolLM2-135M-Instruct": lambda: "demo",
    "Qwen2.5-Coder-0.5B-Instruct": lambda: real_models.gguf("qwen-0.5b"),
    "Qwen2.5-Coder-1.5B-Instruct": lambda: real_models.gguf("qwen-1.5b"),
}
_SAMPLES = ("--samples", "64", "--set", "prune.length=512")
METHODS = {
    "best": ("--method", "best"),
    "best, recovered": ("--method", "best"),
    "fast": ("--method", "fast"),
    "llm-pruner": ("--method", "llm-pruner"),
    "Wanda-sp": ("--importance", "wanda-sp", *_SAMPLES),
    "FLAP": ("--importance", "flap", "--set", "prune.allocation=global", "--set", "global.normalize=zscore", *_SAMPLES),
    "ShortGPT": ("--importance", "block-influence", "--kinds", "layer", "--set", "prune.layers=all", *_SAMPLES),
}
"""The last three are our implementations of the criteria of other papers, with what goes with them there."""
RECOVERY = ("--minutes", "15")
TOKENS, WINDOW = 4096, 512
"""Tokens of each text, and those that are read together."""
COLUMNS = {
    "WikiText-2": "WikiText-2", "C4": "C4", "answers": "answers in chat", "instructions": "answers", "code": "code",
}  # fmt: skip
"""Text → the heading of its column."""
LABELS = {
    ("best", "uniform"): "best, 256 samples",
    ("best", "free"): "best, free widths",
    ("best, recovered", "uniform"): "best, 15 minutes of recovery",
    ("llm-pruner", "uniform"): "LLM-Pruner",
    ("llm-pruner", "free"): "LLM-Pruner, free widths",
    ("FLAP", "free"): "FLAP, free widths",
}
"""Method and shape → the label of a bar; else the method alone."""
HEADS = ("method", "shape", "calibrated on", "decoder", "bytes", "repeat", "cut off", "minutes", "GiB", "commit")
ABOUT = f"""# Quality for size

<!-- Written by benchmarks/quality.py; do not edit. -->

![Mean divergence from the dense model by method](pictures/quality.svg)

Each cell is the perplexity on a text and, in parentheses, the mean KL divergence from the dense model in nats per
token, on the start of the text in windows of {WINDOW} tokens. No model was calibrated or trained on these texts:
WikiText-2's test set, C4 documents, answers to instructions (in the model's chat format, and as plain text), and
modules of Python's standard library.

- *uniform*: all layers have the same width; *free*: the first and last layers stay whole.
- *decoder*: share of its parameters removed; *bytes*: share of all weights removed.
- *self-written*: passages and, in the chat format, answers to 320 instructions, none of which is measured (only
  passages for fast and llm-pruner); *half of each*: half of that, half of C4.
- *Wanda-sp*, *FLAP*, *ShortGPT*: this project's implementation of the paper's criterion.
- *recovered*: after `llmpruner recover --minutes 15`. No other row is trained.
- *repeat*: share of the model's own answers to 40 instructions that repeat themselves; *cut off*: that do not end
  within 128 tokens.
- Rows of *best* without a number of samples are of 256, its default at their commit; now it is 96.
- *minutes*: wall time of the commands; *GiB*: their peak memory; *commit*: the version of the program.
"""
C4_JUDGED = slice(150, 200)
"""Documents of the C4 sample that are measured; no row is calibrated on them."""
CODE = ("argparse", "ast", "dataclasses", "difflib", "inspect", "pathlib", "tarfile", "typing")
"""Modules of Python's standard library."""


@dataclass(frozen=True)
class Row:
    """One result. ``method``: of `METHODS`, or "dense" with ratio 0. ``text``: "self-written", "C4" or "half of each".
    ``samples``: of the calibration; 0 for the method's own number."""

    model: str
    method: str = "dense"
    ratio: float = 0.0
    shape: str = ""
    text: str = ""
    samples: int = 0


def rows() -> Iterator[Row]:
    demo, qwen, larger = MODELS
    yield Row(demo)
    for method, shape in (
        ("best", "uniform"), ("best, recovered", "uniform"), ("fast", "uniform"), ("llm-pruner", "uniform"),
        ("best", "free"),
    ):  # fmt: skip
        yield Row(demo, method, 0.2, shape, "self-written")
    for method, shape in (("Wanda-sp", "uniform"), ("llm-pruner", "free"), ("FLAP", "free"), ("ShortGPT", "")):
        yield Row(demo, method, 0.2, shape, "C4")
    yield Row(qwen)
    yield Row(qwen, "fast", 0.2, "uniform", "self-written")
    for text in ("self-written", "C4", "half of each"):
        yield Row(qwen, "best", 0.2, "uniform", text, samples=64)
    for method, shape in (("llm-pruner", "free"), ("Wanda-sp", "uniform"), ("FLAP", "free"), ("ShortGPT", "")):
        yield Row(qwen, method, 0.2, shape, "C4")
    for model in (demo, qwen):
        for method, text in (("best", "self-written"), ("fast", "self-written"), ("Wanda-sp", "C4")):
            samples = 64 if model == qwen and method == "best" else 0
            yield Row(model, method, 0.3, "uniform", text, samples=samples)
        yield Row(model, "ShortGPT", 0.3, "", "C4")
    yield Row(larger)
    yield Row(larger, "fast", 0.2, "uniform", "self-written")
    for samples in (32, 64):
        yield Row(larger, "best", 0.2, "uniform", "self-written", samples=samples)
    for method, shape in (("llm-pruner", "free"), ("Wanda-sp", "uniform"), ("ShortGPT", "")):
        yield Row(larger, method, 0.2, shape, "C4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[""], help="measure only the rows that hold one of these words")
    parser.add_argument("--again", action="store_true", help="keep the rows apart, beside those that are there")
    parser.add_argument("--render", action="store_true", help="only write the tables")
    options = parser.parse_args()
    file = AGAIN if options.again else RESULTS
    with tempfile.TemporaryDirectory() as work:
        for row in rows() if not options.render else ():
            done = read(file)
            if row in done or not any(word in str(row) for word in options.only):
                continue
            done[row] = measure(row, data_folder(), Path(work))
            file.write_text("".join(json.dumps(entry) + "\n" for entry in done.values()), encoding="utf-8")
            print(row, as_json(done[row]), flush=True)
    PAGE.write_text(page(read(RESULTS), read(AGAIN)), encoding="utf-8")
    PICTURE.write_text(picture(read(RESULTS)), encoding="utf-8")


def read(file: Path) -> dict[Row, dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {Row(**entry["row"]): entry for entry in map(json.loads, lines)}


def measure(row: Row, data: Path, work: Path) -> dict[str, Any]:
    dense = model = str(MODELS[row.model]())
    entry: dict[str, Any] = {"row": vars(row), "tokens": TOKENS, "machine": machine(), "commit": version()}
    if row.method != "dense":
        model, took = prune(dense, options_of(row, data, work), work)
        entry |= took
    if "recovered" in row.method:
        pruned, model = model, str(Path(tempfile.mkdtemp(dir=work)) / "recovered")
        done = run("recover", pruned, *RECOVERY, "--dtype", "float32", "-o", model)
        entry["seconds"] += done["seconds"]
        entry["peak_mib"] = max(entry["peak_mib"], done["peak_mib"])
    return entry | measured_on(dense, model, data)


def version() -> str:
    """The last commit that changed the program."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", "llmpruner", "plugins"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def options_of(row: Row, data: Path, work: Path) -> tuple[str, ...]:
    """Of `llmpruner prune`."""
    c4 = c4_not_judged(data, work)
    text = {"C4": str(c4), "half of each": f"1*self,1*{c4}"}.get(row.text, "self")
    options = [*METHODS[row.method], "--ratio", str(row.ratio), "--calibration", text]
    options += ["--shape", row.shape] if row.shape else []
    options += ["--samples", str(row.samples)] if row.samples else []
    return tuple(options)


def c4_not_judged(data: Path, work: Path) -> Path:
    """A file in ``work`` with the documents of C4 that no divergence is measured on."""
    documents = (data / "c4_sample_300.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    del documents[C4_JUDGED]
    file = work / "c4.jsonl"
    file.write_text("".join(documents), encoding="utf-8")
    return file


@cache
def prune(dense: str, options: tuple[str, ...], work: Path) -> tuple[str, dict[str, Any]]:
    """A pruned model, its size, and the time and memory that it took."""
    output = str(Path(tempfile.mkdtemp(dir=work)) / "pruned")
    done = run("prune", dense, *options, "--dtype", "float32", "-o", output, "--json", timeout=7200)
    took = {key: done[key] for key in ("seconds", "cpu_seconds", "peak_mib")}
    result = json.loads(done["output"])["result"]
    gone = 1 - result["bytes_after"] / result["bytes_before"]
    return output, {**took, "decoder_removed": result["decoder_removed"], "gone": gone}


def measured_on(dense: str, model: str, data: Path) -> dict[str, Any]:
    """``texts``: text → perplexity, and the divergence from the dense model (0 for that itself), in nats per token;
    and ``asked``, what the model answers to instructions."""
    documents = (data / "c4_sample_300.jsonl").read_text(encoding="utf-8").splitlines()[C4_JUDGED]
    texts = {
        "WikiText-2": (data / "wikitext2_unk_test.txt").read_text(encoding="utf-8"),
        "C4": "\n\n".join(json.loads(line)["text"] for line in documents),
        "instructions": instructions(data),
        "code": "\n\n".join(inspect.getsource(import_module(name)) for name in CODE),
    }
    settings = {
        "perplexity.tokens": TOKENS, "perplexity.window": WINDOW, "perplexity.autocast": True,
        "given-answers.data": data / "alpaca_gpt4_en_999.jsonl", "given-answers.limit": TOKENS // 100,
        "given-answers.autocast": True, "given-answers.kl": model != dense,
    }  # fmt: skip
    models = (model,) if model == dense else (dense, model, "--kl")
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    measured = evaluated(*models, "--metrics", "given-answers,answers", *options, texts=texts)
    results = measured["perplexity"]
    results["answers"] = measured["given-answers"]
    kept = ("perplexity", "kl_per_token")
    asked = {name: measured["answers"][name] for name in ("repeat_themselves", "cut_off", "first_tokens")}
    return {"texts": {name: {key: result.get(key) for key in kept} for name, result in results.items()}, "asked": asked}


def picture(done: dict[Row, dict[str, Any]]) -> str:
    """The picture of README: the first model at 20 %, a bar for the mean divergence of each method: this project's
    without a corpus, those of other papers on C4, too."""
    means = {}
    for row, entry in done.items():
        if row.model == next(iter(MODELS)) and row.ratio == 0.2 and (row.text == "self-written" or not is_own(row)):
            means[row] = mean_divergence(entry)
    scale, height = 370 / max(means.values(), default=1), 92 + 30 * len(means)
    title = "SmolLM2-135M without a fifth of its decoder"
    measure = "Divergence (KL) from the dense model, nats per token, mean of five texts; shorter is better"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" width="760" height="{height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="15" fill="#222222">',
        f"<title>{title}</title>",
        f'<rect width="760" height="{height}" rx="8" fill="#fafaf8"/>',
        f'<text x="24" y="34" font-size="17" font-weight="600">{title}</text>',
        f'<text x="24" y="58" fill="#666666">{measure}</text>',
    ]
    for place, (row, mean) in enumerate(sorted(means.items(), key=lambda item: item[1])):
        y, width, colour = 78 + 30 * place, mean * scale, "#00798c" if is_own(row) else "#b9b6ad"
        label = LABELS.get((row.method, row.shape), row.method) + (", on C4" if row.text == "C4" else "")
        parts += [
            f'<text x="304" y="{y + 15}" text-anchor="end">{label}</text>',
            f'<rect x="316" y="{y}" width="{width:.0f}" height="20" rx="3" fill="{colour}"/>',
            f'<text x="{324 + width:.0f}" y="{y + 15}">{mean:.2f}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def mean_divergence(entry: dict[str, Any]) -> float:
    return fmean(text["kl_per_token"] for text in entry["texts"].values())


def is_own(row: Row) -> bool:
    """Whether this project's method gave it, and no other paper's."""
    return row.method.startswith(("best", "fast"))


def page(done: dict[Row, dict[str, Any]], again: dict[Row, dict[str, Any]]) -> str:
    """``docs/quality.md``; ``again``: rows that were measured a second time."""
    sections: list[str] = []
    for model in MODELS:
        chosen = {row: entry for row, entry in done.items() if row.model == model}
        if chosen:
            first = chosen[Row(model)]
            on = f"{first['machine']['cpu']}, {first['machine']['cores']} cores"
            about = f"{first['tokens']:,} tokens of each text; {on}."
            sections += [f"## {model}", "", about, "", *table(chosen), "", *spread(chosen, again)]
    return "\n".join([ABOUT, *sections])


def spread(done: dict[Row, dict[str, Any]], again: dict[Row, dict[str, Any]]) -> list[str]:
    """What rows gave on another day, by their mean divergence over the texts."""
    both = [(row, done[row], entry) for row, entry in again.items() if row in done and row.ratio]
    if not both:
        return []
    shown = [
        f"{row.method} {mean_divergence(first):.3f} and {mean_divergence(second):.3f}, "
        f"in {first['seconds'] / 60:.1f} and {second['seconds'] / 60:.1f} minutes ({second['commit']})"
        for row, first, second in both
    ]
    return [f"Mean divergence, measured here and on another machine of this type: {'; '.join(shown)}.", ""]


def table(done: dict[Row, dict[str, Any]]) -> Sequence[str]:
    lines = [(*HEADS[:5], *COLUMNS.values(), *HEADS[5:])]
    for row, entry in sorted(done.items(), key=lambda item: item[0].ratio):
        text = f"{row.text}, {row.samples} samples" if row.samples else row.text
        cells = [row.method, row.shape or "–", text or "–"]
        cells += [f"−{entry[name]:.1%}" if name in entry else "–" for name in ("decoder_removed", "gone")]
        cells += [cell(entry["texts"][name]) for name in COLUMNS]
        cells += [f"{entry['asked'][name]:.0%}" for name in ("repeat_themselves", "cut_off")]
        took = (f"{entry['seconds'] / 60:.1f}", f"{entry['peak_mib'] / 1024:.1f}") if "seconds" in entry else ("–", "–")
        lines.append((*cells, *took, entry["commit"]))
    shown = [f"| {' | '.join(cells)} |" for cells in lines]
    return [shown[0], "|---" * len(lines[0]) + "|", *shown[1:]]


def cell(result: dict[str, float]) -> str:
    """Perplexity, and KL in parentheses."""
    return f"{result['perplexity']:.2f}" + (f" ({result['kl_per_token']:.3f})" if result["kl_per_token"] else "")


if __name__ == "__main__":
    main()
