"""The paper's table on other models: zero-shot accuracy without a fifth of the decoder, before and after recovery.

    LLMPRUNER_DATA=… LLMPRUNER_MODELS=… python -m benchmarks.tasks FOLDER [--model NAME] [--only ROW …]
    python -m benchmarks.tasks --render

Every row is commands of llmpruner in processes of their own, then lm-eval's BoolQ, PIQA, ARC-easy and OpenBookQA, the
first 1,000 questions of each (all 500 of the last). FOLDER keeps the models, and ``results/tasks.jsonl`` the rows, so
that an interrupted run goes on where it stopped. The table is written into ``docs/quality-tasks.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from .measure import as_json, data_folder, machine, run, write_table
from .quality import MODELS, ROOT, Row, c4_not_judged, options_of, version
from .vocabulary import SAMPLES, counted_text

RESULTS = ROOT / "benchmarks" / "results" / "tasks.jsonl"
PAGE = ROOT / "docs" / "quality-tasks.md"
TASKS = {"boolq": "acc", "piqa": "acc_norm", "arc_easy": "acc_norm", "openbookqa": "acc_norm"}
"""Task → the metric that the paper's table has."""
QUESTIONS = 1000
MINUTES, CORPUS = 60, "C4 and Alpaca"
"""Of recovery, and what it trains on."""
ADAPTERS, LORA = f"{CORPUS}, LoRA", ("--set", "distil.trains=lora", "--learning-rate", "3e-4")
"""The same by adapters."""
LARGE = "Qwen2.5-Coder-1.5B-Instruct"
"""Trained by adapters: its weights, gradients and moments alone are 19 GiB."""
PRUNED = {
    "LLM-Pruner": Row("", "llm-pruner", 0.2, "free", "C4"),
    "Wanda-sp": Row("", "Wanda-sp", 0.2, "uniform", "C4"),
    "best": Row("", "best", 0.2, "uniform", "self-written"),
}
FEWER_TOKENS, RECOVERED = "fewer tokens", ", recovered"
TOKENS_TOO = f"best, {FEWER_TOKENS}"
"""As many parameters as without a fifth of the decoder, but tokens go before channels."""
ROWS = (
    "dense", *PRUNED, TOKENS_TOO, *(f"{name}{RECOVERED}" for name in ("Wanda-sp", "best", TOKENS_TOO)),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="keeps the models")
    parser.add_argument("--model", choices=list(MODELS)[1:], default=list(MODELS)[1])
    parser.add_argument("--only", nargs="*", choices=ROWS, default=ROWS)
    parser.add_argument("--render", action="store_true", help="only write the table")
    options = parser.parse_args()
    if not options.render:
        work = options.folder / options.model
        work.mkdir(parents=True, exist_ok=True)
        for name in options.only:
            if not any((row["model"], row["name"]) == (options.model, name) for row in read()):
                row = measured(options.model, name, work)
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(as_json(row), flush=True)
    write_table(PAGE, "tasks", table(read()))


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def measured(model: str, name: str, work: Path) -> dict[str, Any]:
    path, about = made(model, name, work)
    files, report = work / "tasks", work / "tasks.json"
    report.unlink(missing_ok=True)  # of the row before
    subprocess.run([sys.executable, str(data_folder().parent / "mk_tasks.py"), str(files)], check=True)
    options = ("--limit", str(QUESTIONS), "--set", f"tasks.include_path={files}", "--dtype", "bfloat16")
    done = run("evaluate", path, "--tasks", ",".join(TASKS), *options, "--json", str(report), timeout=36_000)
    (result,) = json.loads(report.read_text())
    kept = {task: {key: result["tasks"][task][key] for key in (m, f"{m}_stderr")} for task, m in TASKS.items()}
    return {
        "model": model, "name": name, "commit": version(), "machine": machine(), "tasks": kept, **about,
        "evaluation_seconds": done["seconds"],
    }  # fmt: skip


def made(model: str, name: str, work: Path) -> tuple[str, dict[str, Any]]:
    """A model, made unless it is in ``work``; and what that took, the models that it is made of included."""
    dense, output = str(MODELS[model]()), str(work / name.replace(", ", "-").replace(" ", "-"))
    if name == "dense":
        return dense, {}
    if name.endswith(RECOVERED):
        start, before = made(model, name.removesuffix(RECOVERED), work)
        path, training = recovered(start, ADAPTERS if model == LARGE else CORPUS, MINUTES, work)
        peak = max(before["peak_mib"], training["peak_mib"])
        return path, {**before, "seconds": before["seconds"] + training["seconds"], "peak_mib": peak}
    facts = Path(f"{output}.json")
    if facts.is_file():
        return output, json.loads(facts.read_text())
    before: dict[str, Any] = {}
    if name == TOKENS_TOO:
        _, best = made(model, "best", work)
        start, before = made(model, FEWER_TOKENS, work)
        done = pruned(start, "--method", "best", "--set", f"prune.target_params={best['parameters']}", "-o", output)
    else:
        options = latin(work) if name == FEWER_TOKENS else options_of(PRUNED[name], data_folder(), work)
        done = pruned(dense, *options, "-o", output)
    about = {
        "seconds": before.get("seconds", 0) + done["seconds"],
        "peak_mib": max(before.get("peak_mib", 0), done["peak_mib"]),
        "parameters": done["parameters"],
    }
    facts.write_text(as_json(about))
    return output, about


def recovered(start: str, text: str, minutes: int, work: Path) -> tuple[str, dict[str, Any]]:
    """``start`` after recovery on a corpus or on self-written text, made unless it is there; and what it took."""
    output = f"{start}-{minutes}-minutes-{text.replace(' ', '-')}"
    if not Path(output).is_dir():
        files = (c4_not_judged(data_folder(), work), data_folder() / "alpaca_en_1k.jsonl")
        data = ",".join(map(str, files)) if text in (CORPUS, ADAPTERS) else "self"
        options = ("--data", data, "--minutes", str(minutes), "--dtype", "float32", *(LORA if text == ADAPTERS else ()))
        # A recovery that was interrupted goes on.
        run("recover", start, *options, "-o", output, timeout=36_000)
    facts = json.loads((Path(output) / "run.json").read_text())
    trained = json.loads((Path(output) / "llmpruner.json").read_text())["recovery"][-1]
    return output, {
        "seconds": facts["seconds"], "peak_mib": round(facts["stages"][-1]["peak_bytes"] / 2**20),
        "steps": len(trained["losses"]),
    }  # fmt: skip


def pruned(*arguments: str) -> dict[str, Any]:
    """`run` of `llmpruner prune`, and the number of parameters that are left."""
    done = run("prune", *arguments, "--dtype", "float32", "--json", timeout=7200)
    return {**done, "parameters": json.loads(done["output"])["result"]["parameters_after"]}


def latin(work: Path) -> tuple[str, ...]:
    """Of `llmpruner prune`, to remove the tokens that English and code seldom need, as in README."""
    tokens = ("--set", "vocabulary.tokens=98304", "--set", "vocabulary.scripts=latin")
    return ("--kinds", "vocabulary", *SAMPLES, *tokens, "--calibration", counted_text(work))


def kept(row: Mapping[str, Any], dense: Mapping[str, Any], without: str = "") -> float:
    """The mean over the tasks, but ``without``, of the share of the dense model's accuracy."""
    return fmean(row["tasks"][task][m] / dense["tasks"][task][m] for task, m in TASKS.items() if task != without)


def table(rows: list[dict[str, Any]]) -> str:
    heads = ["model", "", *TASKS, "mean", "kept", "without boolq", "minutes", "commit"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for model in MODELS:
        of_model = {row["name"]: row for row in rows if row["model"] == model}
        if (dense := of_model.get("dense")) is None:
            continue  # it is still to be measured
        for name in (name for name in ROWS if name in of_model):
            row = of_model[name]
            values = [(row["tasks"][task][m], row["tasks"][task][f"{m}_stderr"]) for task, m in TASKS.items()]
            cells = [model, name, *(f"{100 * value:.1f} ± {100 * error:.1f}" for value, error in values)]
            cells += [f"{100 * fmean(value for value, _ in values):.1f}", f"{kept(row, dense):.1%}"]
            cells.append(f"{kept(row, dense, without='boolq'):.1%}")
            cells += [f"{row['seconds'] / 60:.0f}" if "seconds" in row else "–", row["commit"]]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
