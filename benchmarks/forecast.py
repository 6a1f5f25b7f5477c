"""The forecast of ``prune`` against what it took, on several models and methods.

    python -m benchmarks.forecast            all models
    python -m benchmarks.forecast tiny demo  those alone

Writes ``benchmarks/results/forecast.json``. The goal: memory within 10 %, time within 30 %, on an idle machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .measure import as_json, machine, run

RESULTS = Path(__file__).parent / "results" / "forecast.json"
MODELS = ("tiny", "small", "wide", "demo", "1b")
OPTIONS: dict[str, tuple[str, ...]] = {
    "llm-pruner": ("--method", "llm-pruner"),
    "best": ("--method", "best", "--samples", "32", "--length", "256"),
    "best, layer by layer": ("--method", "best", "--samples", "16", "--length", "256"),
}


def main() -> None:
    names = sys.argv[1:] or MODELS
    earlier = json.loads(RESULTS.read_text())["runs"] if sys.argv[1:] and RESULTS.is_file() else {}
    results: dict[str, Any] = {"machine": machine(), "command": "python -m benchmarks.forecast", "runs": earlier}
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            model = "demo" if name == "demo" else str(Path(work) / name)
            if model != "demo":
                # In a process of its own, as its memory would count as that of the commands.
                subprocess.run([sys.executable, "-m", "benchmarks.shapes", name, model], check=True)
            results["runs"][name] = {}
            for what, options in OPTIONS.items():
                limit = ("--max-memory", str(_below(results["runs"][name]["best"]))) if "layer by layer" in what else ()
                results["runs"][name][what] = one(model, Path(work) / "out", *options, *limit)
                RESULTS.write_text(as_json(results).replace(work, "$WORK"))


def _below(resident: dict[str, Any]) -> int:
    """A limit that the model in memory does not fit into."""
    return int(resident["forecast"]["memory"] * 0.97)


def one(model: str, out: Path, *options: str) -> dict[str, Any]:
    """Forecast, what was used, and the ratios of the former to the latter."""
    tokenizer = () if model == "demo" else ("--no-tokenizer",)
    done = run("prune", model, "--ratio", "0.2", *options, *tokenizer, "-o", str(out), "--json")
    subprocess.run(["rm", "-r", str(out)], check=True)
    forecast = json.loads(done.pop("output"))["forecast"]
    ratios = {
        "memory": round(forecast["memory"] / (done["peak_mib"] * 2**20), 3),
        "seconds": round(forecast["seconds"] / forecast["used"]["seconds"], 3),
    }
    print(model, *options, ratios)
    return {**done, "forecast": forecast, "forecast / used": ratios}


if __name__ == "__main__":
    main()
