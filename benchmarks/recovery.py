"""Twenty random settings of a short training: is what they save ever worse than the pruned model they began with?

    python -m benchmarks.recovery

The demo model, without a fifth of its decoder, is distilled on rows that the dense model writes, for 1 to 50 steps of 1
to 16 rows at rates from 1e-6 to 1e-2. Its divergence from the dense model is measured on the documentation of Python,
which is neither trained on nor among the held-out rows. Rows are kept in ``results/recovery.json``, so that an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .measure import as_json, machine

RESULTS = Path(__file__).parent / "results" / "recovery.json"
SETTINGS, WRITTEN = 20, "self-text:96"


def main() -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command("prune", "demo", "--ratio", "0.2", "--method", "fast", "-o", str(folder / "pruned"))
        write_rows(folder / "rows.jsonl")
        results |= {"machine": machine(), "command": "python -m benchmarks.recovery"}
        results["start"] = {"kl": divergence(folder / "pruned", folder)}
        print(results["start"])
        for number, options in list(enumerate(random_settings()))[len(results["rows"]) :]:
            row = {**options, **trained(options, folder, results["start"]["kl"])}
            print(number + 1, row, flush=True)
            results["rows"].append(row)
            RESULTS.write_text(as_json(results))
    worse = [n + 1 for n, row in enumerate(results["rows"]) if row["kl"] > results["start"]["kl"]]
    print(f"worse than their start on text that nothing saw: {worse or 'none'}")


def random_settings() -> list[dict[str, Any]]:
    """Steps, rates and batch sizes, all from logarithmic scales."""
    numbers = random.Random(1)

    def draw(low: float, high: float) -> float:
        return math.exp(numbers.uniform(math.log(low), math.log(high)))

    return [
        {
            "max-steps": round(draw(1, 50)),
            "learning-rate": float(f"{draw(1e-6, 1e-2):.2g}"),
            "batch-size": round(draw(1, 16)),
        }
        for _ in range(SETTINGS)
    ]


def trained(options: dict[str, Any], folder: Path, start: float) -> dict[str, Any]:
    """What a training with ``options`` saves; ``start``: the divergence of the pruned model."""
    output = folder / "recovered"
    shutil.rmtree(output, ignore_errors=True)
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    data = ("--data", str(folder / "rows.jsonl"), "--cutoff", "64", "--restart")
    code = command("recover", str(folder / "pruned"), *data, *words, "-o", str(output))
    if code not in (0, 3):
        raise SystemExit(code)
    record = json.loads((output / "llmpruner.json").read_text())["recovery"][-1]
    held_out = [[v["step"], round(v["loss"], 5), round(v["error"], 5)] for v in record["validation"]]
    kl = start if code == 3 else divergence(output, folder)  # 3: the weights are those of the start
    return {"exit": code, "best_step": record["best_step"], "held_out": held_out, "kl": kl}


def divergence(model: Path, folder: Path) -> float:
    """KL divergence of ``model`` from the dense model on text that no training saw."""
    file = folder / "evaluation.json"
    file.unlink(missing_ok=True)
    options = ("--perplexity", "pydoc", "--set", "perplexity.tokens=1024", "--window", "128", "--json", str(file))
    command("evaluate", "demo", str(model), "--kl", "--dtype", "float32", *options)
    return round(json.loads(file.read_text())[-1]["perplexity"]["kl_per_token"], 5)


def write_rows(file: Path) -> None:
    """What the dense model writes, once for all trainings."""
    import llmpruner
    from llmpruner.recovery.data import dense_text_in, write_examples

    model, text = llmpruner.load("demo"), dense_text_in(WRITTEN)
    examples = write_examples(text, model, seed=0)
    file.write_text("".join(json.dumps(asdict(example)) + "\n" for example in examples), encoding="utf-8")


def command(*arguments: str) -> int:
    """The exit code of ``llmpruner ARGUMENTS``, in this process."""
    from llmpruner.cli import main

    sys.argv = ["llmpruner", *arguments]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    main()
