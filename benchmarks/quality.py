"""Quality for size: model × shape × kinds × method × ratio × calibration text on real models, without training.

    LLMPRUNER_DATA=… python -m benchmarks.quality [--only TEXT …] [--ratios 0.1,0.2] [--models demo] [--tasks]

Every row is one `llmpruner prune` in a process of its own, then perplexity, and the divergence from the dense model, on
texts that no calibration has seen: WikiText-2's test part, documents of C4, answers to instructions in the model's
chat format and without it, and code. ``--models``: of `MODELS`, or a checkpoint. ``--tasks``: zero-shot tasks too
(the first 1,000 rows of each, with the standard error of the difference from the dense model). Rows are kept in
``results/quality.jsonl``, so an interrupted run goes on where it stopped; ``docs/quality.md``, its plot and the
README's table are drawn from them.
"""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
import tempfile
from importlib import import_module
from math import hypot
from pathlib import Path
from typing import Any

from .measure import TOKENS, WINDOW, data_folder, instructions, machine, run
from .quality_page import TASKS, answers_of, draw
from .quality_rows import MODELS, OPTIONS, RATIOS, RESULTS, TEXTS, Row, read_results, rows

TASK_ROWS = 1000
C4_JUDGED = slice(150, 200)
"""Documents of the C4 sample that are measured; no row is calibrated on them, and no choice was made by them
(`benchmarks.ablation` chooses by those after them)."""
CODE = ("argparse", "ast", "dataclasses", "difflib", "inspect", "pathlib", "tarfile", "typing")
"""Modules of Python's standard library."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", default=",".join(map(str, RATIOS)))
    parser.add_argument("--models", default=",".join(MODELS), help="of the benchmark's models, or checkpoints")
    parser.add_argument("--only", nargs="*", default=[""], help="measure only the rows whose name holds one of these")
    parser.add_argument("--samples", type=int, default=0, help="calibration samples of `best`, where its own are many")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each text; fewer answers in the same proportion")
    parser.add_argument("--tasks", action="store_true", help="zero-shot tasks too: minutes per row")
    parser.add_argument("--time", action="store_true", help="only prune again rows that are known, on an idle machine")
    parser.add_argument("--shared", action="store_true", help="say that the machine has other work meanwhile")
    arguments = parser.parse_args()
    data = data_folder()
    done = read_results()
    for row in dict.fromkeys(rows(tuple(map(float, arguments.ratios.split(","))), arguments.models.split(","))):
        if arguments.samples and row.method.startswith("best"):
            row = Row(**{**vars(row), "samples": arguments.samples})  # noqa: PLW2901
        known = done.get(row.key, {})
        chosen = any(text in row.key for text in arguments.only)
        if arguments.time:
            if chosen and "seconds" in known:
                with tempfile.TemporaryDirectory() as work:
                    timed = prune(row, data, Path(work), str(Path(work) / "pruned"))
                found = {**known, **timed, "machine": machine(), "shared": arguments.shared}
                write(row, found)
            continue
        if not chosen or ("texts" in known and ("difference" in known.get("tasks", {}) or not arguments.tasks)):
            continue
        with tempfile.TemporaryDirectory() as work:
            # Whole, though some of it is known: a row speaks of one model.
            found = measure(row, data, Path(work), tokens=arguments.tokens, tasks=arguments.tasks)
        if arguments.shared:
            found["shared"] = True
        write(row, found)
    draw(read_results())


def write(row: Row, found: dict[str, Any]) -> None:
    """Into the results, to which another run may have added rows meanwhile."""
    done = read_results() | {row.key: found}
    RESULTS.write_text("".join(json.dumps(entry) + "\n" for entry in done.values()), encoding="utf-8")
    print(row.key, {k: v for k, v in found.items() if k not in ("row", "machine")}, flush=True)


def measure(row: Row, data: Path, work: Path, *, tokens: int, tasks: bool) -> dict[str, Any]:
    dense = MODELS.get(row.model, lambda: row.model)()
    model = dense
    found: dict[str, Any] = {"row": vars(row), "tokens": tokens, "machine": machine()}
    if row.method != "dense":
        model = str(work / "pruned")
        found |= prune(row, data, work, model)
    found["texts"] = measured_on(dense, model, data, work, tokens)
    found |= {"perplexity": found["texts"]["WikiText-2"]["perplexity"], "kl": found["texts"]["WikiText-2"]["kl"]}
    found["perplexity_instructions"] = found["texts"]["instructions"]["perplexity"]
    if tasks:
        report = work / "tasks.json"
        limit = ("--tasks", ",".join(TASKS), "--limit", str(TASK_ROWS), "--set", f"tasks.include_path={work}/tasks")
        _task_files(data, work / "tasks")
        models = [dense] if model == dense else [dense, model]
        run("evaluate", *models, *limit, "--dtype", "float32", "--json", str(report), timeout=7200)
        first, last = (json.loads(report.read_text())[number] for number in (0, -1))
        found["tasks"] = last["tasks"] | {"rows": TASK_ROWS}
        found["tasks"]["difference"] = {name: difference(first, last, name) for name in TASKS}
    return found


def prune(row: Row, data: Path, work: Path, output: str) -> dict[str, Any]:
    """Write the pruned model of a row; its size, time and memory."""
    files = {"wikitext": data / "wikitext2_unk_validation.jsonl", "c4": work / "c4.jsonl"}
    documents = (data / "c4_sample_300.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    judged = set(range(len(documents))[C4_JUDGED])
    files["c4"].write_text("".join(line for n, line in enumerate(documents) if n not in judged), encoding="utf-8")
    options = OPTIONS.get(row.method, ("--method", row.method))
    if row.samples:
        options = (*options, "--samples", str(row.samples))
    # Layers that stay keep their widths.
    shape = () if row.kinds == "layer" else ("--shape", row.shape)
    options = (*options, "--kinds", row.kinds, *shape, "--ratio", str(row.ratio))
    dense, text = MODELS.get(row.model, lambda: row.model)(), TEXTS[row.text].format(**files)
    done = run("prune", dense, *options, "--dtype", "float32", "--calibration", text, "-o", output, "--json")
    result = json.loads(done["output"])["result"]
    took = {key: done[key] for key in ("seconds", "cpu_seconds", "peak_mib")}
    return {**took, "decoder_removed": result["decoder_removed"]}


def measured_on(dense: str, model: str, data: Path, work: Path, tokens: int) -> dict[str, dict[str, float]]:
    """Text → perplexity, and with it the divergence from the dense model (0 for that itself), in nats per token."""
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
    report, answers = work / "evaluation.json", data / "alpaca_gpt4_en_999.jsonl"
    models = (model,) if model == dense else (dense, model, "--kl", "--set", "answers.kl=true")
    command = (
        "evaluate", *models, "--dtype", "float32", "--perplexity", ",".join(map(str, files.values())),
        "--set", f"perplexity.tokens={tokens}", "--set", "perplexity.autocast=true", "--window", str(WINDOW),
        "--metrics", "answers",
        "--set", f"answers.data={answers}", "--set", f"answers.limit={answers_of(tokens)}",
        "--set", "answers.autocast=true", "--json", str(report),
    )  # fmt: skip
    run(*command)
    found = json.loads(report.read_text())[-1]
    of_texts = {str(files["WikiText-2"]): found["perplexity"], **found["perplexity"]["others"]}
    results = {name: of_texts[str(file)] for name, file in files.items()} | {"answers": found["answers"]}
    return {name: {"perplexity": one["perplexity"], "kl": one["kl_per_token"] or 0.0} for name, one in results.items()}


def difference(first: dict[str, Any], other: dict[str, Any], task: str) -> dict[str, float | None]:
    """The accuracy of ``other`` minus that of ``first`` on a task, and its standard error (not of paired rows)."""
    before, after = (one["tasks"][task] for one in (first, other))
    return {"mean": after["acc"] - before["acc"], "error": hypot(before["acc_stderr"], after["acc_stderr"])}


def _task_files(data: Path, folder: Path) -> None:
    script = next(f for f in (data / "mk_tasks.py", data.parent / "mk_tasks.py") if f.is_file())
    subprocess.run([sys.executable, str(script), str(folder)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
