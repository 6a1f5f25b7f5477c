"""Quality for size: shape × method × ratio × calibration text on the real model, without training.

    LLMPRUNER_DATA=… python -m benchmarks.quality [--only TEXT] [--ratios 0.1,0.2] [--tasks]

Every row is one `llmpruner prune` in a process of its own, then perplexity on two texts that no calibration has seen
and the divergence from the dense model on the first. Rows are kept in ``results/quality.jsonl``, so an interrupted run
goes on where it stopped; ``docs/quality.md`` and its plot are drawn from them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from . import ordering, plots
from .measure import TOKENS, WINDOW, data_folder, machine, measured, run

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "quality.md"
PLOT = Path(__file__).parents[1] / "docs" / "quality.svg"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
METHODS = ("best", "fast", "llm-pruner")
SHAPES = ("uniform", "free")
TEXTS = {
    "WikiText-2 validation": "wikitext2_unk_validation.jsonl",
    "C4 sample": "c4_sample_300.jsonl",
    "self-generated": "self",
    "C4 and self-generated": "c4_sample_300.jsonl,self",
}
TASKS = "piqa,arc_easy,openbookqa"


@dataclass(frozen=True)
class Row:
    """One point. ``text``: what the pruned model was calibrated on; the dense model has ratio 0 and no method.
    ``shape``: of the result; free in the results of version 0.1, which knew no other."""

    method: str
    ratio: float
    text: str
    shape: str = "free"

    @property
    def key(self) -> str:
        return f"{self.method} {self.ratio:g} {self.text} {self.shape}"


def rows(ratios: tuple[float, ...]) -> Iterator[Row]:
    yield Row("dense", 0.0, "")
    # The row that says most comes first, should the run be cut short.
    for text in TEXTS:
        for method in METHODS:
            for ratio in sorted(ratios, key=lambda r: abs(r - 0.2)):
                for shape in SHAPES:
                    yield Row(method, ratio, text, shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", default=",".join(map(str, RATIOS)))
    parser.add_argument("--only", default="", help="measure only the rows whose name holds this text")
    parser.add_argument("--tasks", action="store_true", help="zero-shot tasks too (400 rows each: minutes per row)")
    parser.add_argument("--shared", action="store_true", help="say that the machine has other work meanwhile")
    arguments = parser.parse_args()
    data = data_folder()
    done = read_results()
    for row in rows(tuple(map(float, arguments.ratios.split(",")))):
        known = done.get(row.key, {})
        if arguments.only not in row.key or ("kl" in known and ("tasks" in known or not arguments.tasks)):
            continue
        with tempfile.TemporaryDirectory() as work:
            # Whole, though some of it is known: a row speaks of one model.
            found = measure(row, data, Path(work), tasks=arguments.tasks)
        if arguments.shared:
            found["shared"] = True
        # Another run may have added rows meanwhile.
        done = read_results() | {row.key: found}
        RESULTS.write_text("".join(json.dumps(entry) + "\n" for entry in done.values()), encoding="utf-8")
        print(row.key, {k: v for k, v in done[row.key].items() if k not in ("row", "machine")}, flush=True)
    draw(done)


def points_of(done: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What was measured of pruned models, in the order of the tables."""
    points = [entry for entry in done.values() if entry["row"]["method"] != "dense"]
    return sorted(
        points, key=lambda e: (shape_of(e) == "free", e["row"]["ratio"], e["row"]["text"], e["row"]["method"])
    )


def shape_of(entry: dict[str, Any]) -> str:
    return Row(**entry["row"]).shape


def read_results() -> dict[str, dict[str, Any]]:
    if not RESULTS.is_file():
        return {}
    found = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return {Row(**entry["row"]).key: entry for entry in found}


def measure(row: Row, data: Path, work: Path, *, tasks: bool) -> dict[str, Any]:
    model, found = "demo", {"row": vars(row), "machine": machine()}
    if row.method != "dense":
        model = str(work / "pruned")
        text = ",".join(name if name == "self" else str(data / name) for name in TEXTS[row.text].split(","))
        options = ("--method", row.method, "--shape", row.shape, "--ratio", str(row.ratio))
        done = run("prune", "demo", *options, "--dtype", "float32", "--calibration", text, "-o", model, "--json")
        result = json.loads(done["output"])["result"]
        found |= {key: done[key] for key in ("seconds", "cpu_seconds", "peak_mib")}
        found |= {"decoder_removed": result["decoder_removed"]}
    second = work / "instructions.txt"
    second.write_text(_instructions(data), encoding="utf-8")
    first = measured(model, data / "wikitext2_unk_test.txt", work)
    found |= {"perplexity": first["perplexity"], "kl": first["kl_per_token"]}
    found["perplexity_instructions"] = measured(model, second, work, kl=False)["perplexity"]
    if tasks:
        report = work / "tasks.json"
        options = ("--tasks", TASKS, "--limit", "400", "--include-path", str(work / "tasks"), "--dtype", "float32")
        _task_files(data, work / "tasks")
        run("evaluate", model, *options, "--json", str(report), timeout=7200)
        found["tasks"] = json.loads(report.read_text())[0]["tasks"]
    return found


def _instructions(data: Path) -> str:
    """A second text of another kind: the answers of an instruction set."""
    lines = (data / "alpaca_gpt4_en_999.jsonl").read_text(encoding="utf-8").splitlines()
    return "\n\n".join(json.loads(line)["output"] for line in lines)


def _task_files(data: Path, folder: Path) -> None:
    script = next(f for f in (data / "mk_tasks.py", data.parent / "mk_tasks.py") if f.is_file())
    subprocess.run([sys.executable, str(script), str(folder)], check=True, stdout=subprocess.DEVNULL)


def draw(done: dict[str, dict[str, Any]]) -> None:
    """The tables and the plot of ``docs/quality.md`` and the README."""
    dense = done.get(Row("dense", 0.0, "").key)
    if dense is None:
        return
    PAGE.write_text(page(done), encoding="utf-8")
    head, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    README.write_text(f"{head}{BEGIN}\n{overview(done)}{END}{tail}", encoding="utf-8")
    _plot(dense["perplexity"], points_of(done))


def overview(done: dict[str, dict[str, Any]]) -> str:
    """WikiText-2 perplexity by method, calibration text and ratio."""
    dense = done[Row("dense", 0.0, "").key]
    ratios = [ratio for ratio in RATIOS if any(e["row"]["ratio"] == ratio for e in points_of(done))]
    lines = [
        "| shape | method | calibrated on | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |",
        "|---" * (3 + len(ratios)) + "|",
        "| | dense | | " + " | ".join([f"{dense['perplexity']:.2f}"] * len(ratios)) + " |",
    ]
    for shape, text, method in product(SHAPES, TEXTS, METHODS):
        found = [done.get(Row(method, ratio, text, shape).key) for ratio in ratios]
        if any(found):
            cells = [f"{e['perplexity']:.2f}" if e else "" for e in found]
            lines.append(f"| {shape} | {method} | {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page(done: dict[str, dict[str, Any]]) -> str:
    """``docs/quality.md``"""
    dense = done[Row("dense", 0.0, "").key]
    lines = [
        "# Quality for size",
        "",
        "<!-- Written by benchmarks/quality.py; do not edit. -->",
        "",
        "SmolLM2-135M-Instruct, MLP channels, no training. *Shape*: uniform (the default), every layer of one width, "
        "or free, with layers 0-2 and 27-29 whole. *Ratio*: share of the decoder's parameters that was asked for, then "
        f"that was removed. Perplexity: first {TOKENS:,} tokens in windows of {WINDOW}, float32 weights, bfloat16 "
        "products; WikiText-2 test (unknown words as `<unk>`) and answers to instructions, neither of them used "
        "for calibration. KL: mean divergence from the dense model per WikiText-2 token, in nats. "
        f"Dense: {dense['perplexity']:.2f} and {dense['perplexity_instructions']:.2f}. Seconds: the whole `prune` "
        "command.",
        "",
        "![Perplexity over the share of parameters removed](quality.svg)",
        "",
        "| shape | method | calibrated on | ratio | removed | WikiText-2 | KL | instructions | seconds | peak MiB | "
        "machine |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    points = points_of(done)
    for entry in points:
        row, seconds = entry["row"], f"{entry['seconds']:.0f}" + ("†" if entry.get("shared") else "")
        lines.append(
            f"| {shape_of(entry)} | {row['method']} | {row['text']} | {row['ratio']:.0%} | "
            f"{entry['decoder_removed']:.1%} | {entry['perplexity']:.2f} | "
            f"{entry['kl']:.3f} | {entry['perplexity_instructions']:.2f} | {seconds} | {entry['peak_mib']} | "
            f"{entry['machine']['cpu']}, {entry['machine']['cores']} cores |"
        )
    if any(entry.get("shared") for entry in points):
        lines += ["", "† While the machine had other work."]
    lines += ["", "What each step of the method changes, and what does not help: [variants](quality-notes.md)."]
    lines += _tasks([dense, *sorted(points, key=lambda e: e["perplexity"])])
    lines += _ordering()
    return "\n".join(lines) + "\n"


def _tasks(entries: list[dict[str, Any]]) -> list[str]:
    """Accuracy of the models whose tasks were measured, in the order of their perplexity."""
    entries = [entry for entry in entries if "tasks" in entry]
    if not entries:
        return []
    names = TASKS.split(",")
    lines = [
        "",
        "Zero-shot accuracy (lm-eval, first 400 rows of each task, ± its standard error), best perplexity first:",
        "",
        f"| model | WikiText-2 | KL | instructions | {' | '.join(names)} | mean |",
        "|---|---|---|---" + "|---" * (len(names) + 1) + "|",
    ]
    for entry in entries:
        row, tasks = entry["row"], entry["tasks"]
        label = (
            "dense"
            if row["method"] == "dense"
            else f"{row['method']}, {shape_of(entry)}, {row['ratio']:.0%}, {row['text']}"
        )
        cells = [f"{tasks[name]['acc']:.3f} ± {tasks[name]['acc_stderr']:.3f}" for name in names]
        mean = sum(tasks[name]["acc"] for name in names) / len(names)
        texts = f"{entry['perplexity']:.2f} | {entry['kl']:.3f} | {entry['perplexity_instructions']:.2f}"
        lines.append(f"| {label} | {texts} | {' | '.join(cells)} | {mean:.3f} |")
    return lines


def _ordering() -> list[str]:
    results = ordering.read()
    if not results:
        return []
    text = (
        "The paper's criteria at 20 %, all else as `--method llm-pruner` has it (ten samples of 64 tokens of "
        "WikiText-2 validation, no compensation), WikiText-2 perplexity:"
    )
    return ["", text, "", *ordering.table(results)]


def _plot(dense: float, points: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    texts = dict(zip(TEXTS, ("-", "--", ":", "-."), strict=True))
    colours = dict(zip(METHODS, ("tab:green", "tab:blue", "tab:red"), strict=True))
    markers = dict(zip(SHAPES, ("o", "x"), strict=True))
    for (method, colour), (text, style), (shape, marker) in product(colours.items(), texts.items(), markers.items()):
        row = {"method": method, "text": text}
        chosen = [e for e in points if row.items() <= e["row"].items() and shape_of(e) == shape]
        curve = sorted((e["decoder_removed"], e["perplexity"]) for e in chosen)
        if curve:
            x, y = zip((0.0, dense), *curve, strict=True)
            axes.plot(x, y, style, color=colour, marker=marker, markersize=4, label=f"{method}, {text}, {shape}")
    axes.set(xlabel="decoder parameters removed", ylabel="perplexity on WikiText-2", yscale="log")
    axes.xaxis.set_major_formatter("{x:.0%}")
    plots.save(figure, PLOT)


if __name__ == "__main__":
    main()
