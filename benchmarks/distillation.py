"""Distillation with the dense model in memory while training, and with its predictions read once before: seconds, peak
memory, and the divergence from the dense model on five texts.

    LLMPRUNER_DATA=… python -m benchmarks.distillation [--rounds N] [--pruned FOLDER]

SmolLM2-135M without a fifth of its MLPs (``--method fast``; or FOLDER, pruned before) learns from the same rows for
three epochs, each way in turn and in a process of its own. Rows are C4 and answers to instructions, none of which is
measured. Writes ``results/distillation.json``, each training when it is done. Needs an idle machine for its seconds.
"""

from __future__ import annotations

import argparse
import inspect
import json
import tempfile
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any

from .measure import as_json, data_folder, evaluated, instructions, machine, run
from .quality import C4_JUDGED, CODE

RESULTS = Path(__file__).parent / "results" / "distillation.json"
DOCUMENTS, ANSWERS = 30, slice(500, 530)
"""78 rows of 256 tokens to train on, and 8 that are held out."""
TRAINING = {"epochs": 3, "batch_size": 4, "cutoff": 256, "validation": 8, "learning_rate": 1e-4}
WAYS = ("beside", "read once")
TOKENS = 2048
"""Of each text that is measured."""
FAST = ("--set", "perplexity.autocast=true")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1, help="trainings of each way")
    parser.add_argument("--pruned", help="the pruned model, instead of pruning it")
    parser.add_argument("--train", nargs=4, metavar=("WAY", "PRUNED", "DATA", "OUTPUT"), help="one training, by itself")
    options = parser.parse_args()
    if options.train:
        train(*options.train)
        return
    results: dict[str, Any] = {"machine": machine(), "training": TRAINING, "tokens": TOKENS, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        work, pruned = Path(folder), options.pruned
        if pruned is None:
            pruned = str(work / "pruned")
            run("prune", "demo", "--method", "fast", "--ratio", "0.2", "--dtype", "float32", "-o", pruned)
        data = work / "rows.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in training_texts()), encoding="utf-8")
        results["start"] = divergences(pruned)
        for number in range(options.rounds):
            for way in WAYS:
                output = work / f"{way}-{number}".replace(" ", "-")
                done = run("--train", way, pruned, str(data), str(output), module=__spec__.name)
                stages = json.loads((output / "run.json").read_text())["stages"]
                (record,) = json.loads((output / "llmpruner.json").read_text())["recovery"]
                results["runs"].append({
                    "way": way, **{key: done[key] for key in ("seconds", "cpu_seconds", "peak_mib")},
                    "stages": {stage["name"]: stage["seconds"] for stage in stages},
                    "examples": record["examples"], "steps": len(record["losses"]),
                    "held_out": record["validation"][-1]["loss"], "divergence": divergences(str(output)),
                })  # fmt: skip
                RESULTS.write_text(as_json({**results, "summary": summary(results["runs"])}), encoding="utf-8")
                print(as_json(results["runs"][-1]), flush=True)
    print(as_json(summary(results["runs"])))


def train(way: str, pruned: str, data: str, output: str) -> None:
    import llmpruner
    from llmpruner.recovery import recover

    recover._reads_once = lambda *_: way == WAYS[0]
    llmpruner.recover(pruned, data=data, output=output, load=llmpruner.LoadSettings(dtype="float32"), **TRAINING)


def training_texts() -> list[str]:
    data = data_folder()
    answers = (data / "alpaca_gpt4_en_999.jsonl").read_text(encoding="utf-8").splitlines()[ANSWERS]
    return [*c4(data)[:DOCUMENTS], *(json.loads(line)["output"] for line in answers)]


def c4(data: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (data / "c4_sample_300.jsonl").read_text("utf-8").splitlines()]


def divergences(model: str) -> dict[str, float]:
    """Text → mean divergence from the dense model, nats per token."""
    data = data_folder()
    roleplay = (data / "gpteacher_roleplay_en.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {
        "WikiText-2": (data / "wikitext2_unk_test.txt").read_text(encoding="utf-8"),
        "C4": "\n\n".join(c4(data)[C4_JUDGED]),
        "instructions": instructions(data),
        "roleplay": "\n\n".join(json.loads(line)["output"] for line in roleplay),
        "code": "\n\n".join(inspect.getsource(import_module(name)) for name in CODE),
    }
    measured = evaluated("demo", model, "--kl", "--set", f"perplexity.tokens={TOKENS}", *FAST, texts=texts)
    return {name: each["kl_per_token"] for name, each in measured["perplexity"].items()}


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Way → the best time, the largest peak and the mean divergence of its trainings."""
    by_way = {way: [each for each in runs if each["way"] == way] for way in WAYS}
    return {
        way: {
            **{key: min(each[key] for each in done) for key in ("seconds", "cpu_seconds")},
            "peak_mib": max(each["peak_mib"] for each in done),
            "divergence": fmean(fmean(each["divergence"].values()) for each in done),
        }
        for way, done in by_way.items()
        if done
    }


if __name__ == "__main__":
    main()
