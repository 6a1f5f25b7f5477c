"""The main job on the real model: amount, quality, memory, time, determinism.

    LLMPRUNER_DATA=… python -m benchmarks.main_job

Perplexity: WikiText-2 test with unknown words (first 20,480 tokens, windows of 512, float32), calibration on the
validation text. Writes ``benchmarks/results/main_job.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .measure import as_json, machine, run

RESULTS = Path(__file__).parent / "results" / "main_job.json"
SEEDS = (0, 1, 2)
DENSE = 25.615
"""The perplexity of the dense model."""
PRUNE = (
    "--importance",
    "taylor",
    "--kinds",
    "mlp",
    "--layers",
    "3-26",
    "--shape",
    "free",
    "--ratio",
    "0.2",
    "--dtype",
    "float32",
)
RECOVER = ("--batch-size", "16", "--micro-batch-size", "8", "--learning-rate", "3e-4", "--epochs", "1", "--autocast")


def main() -> None:
    data = os.environ.get("LLMPRUNER_DATA")
    if not data:
        raise SystemExit("set LLMPRUNER_DATA to the folder that holds the shared data sets")
    folder = next(f for f in (Path(data) / "data", Path(data)) if (f / "wikitext2_unk_test.txt").is_file())
    with tempfile.TemporaryDirectory() as work:
        results = measure(folder, Path(work))
    RESULTS.parent.mkdir(exist_ok=True)
    # Where things lay on this machine is nobody's business.
    RESULTS.write_text(as_json(results).replace(str(folder), "$LLMPRUNER_DATA/data").replace(work, "$WORK"))


def measure(data: Path, work: Path) -> dict[str, Any]:
    test, validation = str(data / "wikitext2_unk_test.txt"), str(data / "wikitext2_unk_validation.jsonl")
    results: dict[str, Any] = {
        "machine": machine(),
        "prune_self": prune("demo", work / "self", "--importance", "taylor", "--shape", "free", "--ratio", "0.2"),
    }
    results["same_plan_twice"] = same_plan(work)
    results["perplexity"] = {"dense": perplexity("demo", test, work)}
    if abs(results["perplexity"]["dense"] - DENSE) > 1e-3:
        raise SystemExit(f"the dense model has a perplexity of {results['perplexity']['dense']}; expected {DENSE}")
    for seed in SEEDS:
        out = work / f"seed-{seed}"
        results[f"prune_seed_{seed}"] = prune("demo", out, *PRUNE, "--calibration", validation, "--seed", str(seed))
        results["perplexity"][f"pruned, seed {seed}"] = perplexity(str(out), test, work)
    results["perplexity"]["pruned, self-generated text"] = perplexity(str(work / "self"), test, work)
    alpaca = ("--data", str(data / "alpaca_en_1k.jsonl"), "--limit", "600")
    recovered = run("recover", str(work / "seed-0"), *alpaca, *RECOVER, "-o", str(work / "recovered"))
    results["recover_seed_0"] = without_output(recovered)
    results["perplexity"]["recovered, seed 0"] = perplexity(str(work / "recovered"), test, work)
    return results


def prune(model: str, out: Path, *options: str) -> dict[str, Any]:
    done = run("prune", model, *options, "-o", str(out), "--json")
    return without_output(done) | {"result": json.loads(done["output"])["result"]}


def perplexity(model: str, text: str, work: Path) -> float:
    file = work / "evaluation.json"
    run(
        "evaluate",
        model,
        "--perplexity",
        text,
        "--set",
        "perplexity.tokens=20480",
        "--dtype",
        "float32",
        "--json",
        str(file),
    )
    return float(json.loads(file.read_text())[0]["perplexity"]["perplexity"])


def same_plan(work: Path) -> bool:
    digests = set()
    for name in ("first.json", "second.json"):
        run("plan", "demo", "--ratio", "0.2", "-o", str(work / name))
        digests.add(hashlib.sha256((work / name).read_bytes()).hexdigest())
    return len(digests) == 1


def without_output(done: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in done.items() if key != "output"}


if __name__ == "__main__":
    main()
