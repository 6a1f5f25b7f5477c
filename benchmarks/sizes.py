"""Memory and time of a prune against the size of the model: random LLaMAs of 0.2 to 13 billion parameters, streamed
from their files.

    LLMPRUNER_DATA=… python -m benchmarks.sizes [SHAPE …]

``SHAPE``: of `LIMITS`; the others keep their results. Writes ``results/sizes.json`` and the table in
``docs/how-to/scale.md``. Needs an idle machine, and for 13B 50 GB of disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .measure import as_json, data_folder, machine, run, write_table

RESULTS = Path(__file__).parent / "results" / "sizes.json"
PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "scale.md"
LIMITS = {"wide": "1GiB", "1b": "2GiB", "3b": "3GiB", "7b": "4GiB", "13b": "6GiB"}
"""Shapes of `benchmarks.shapes`, and ``--max-memory``."""
TEXT = "wikitext2_unk_validation.jsonl"
"""Of the data folder. Text that a model writes takes a pass over all weights for every token."""


def main() -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in sys.argv[1:] or list(LIMITS):
        results[name] = {"machine": machine(), **pruned(name)}
        RESULTS.write_text(as_json(results))
        print(name, results[name]["seconds"], results[name]["peak_mib"])
    write_table(PAGE, "sizes", table(results))


def pruned(name: str) -> dict[str, Any]:
    """One prune of a random model."""
    text = data_folder() / TEXT
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / name
        subprocess.run([sys.executable, "-m", "benchmarks.shapes", name, str(model)], check=True)
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        options = ("--method", "llm-pruner", "--ratio", "0.2", "--calibration", str(text), "--max-memory", LIMITS[name])
        done = run("prune", str(model), *options, "-o", f"{work}/out")
    done.pop("output")
    command = done["command"].replace(work, "$WORK").replace(str(text.parent), "$LLMPRUNER_DATA")
    return {**done, "command": command, "weights": weights}


def table(results: dict[str, Any]) -> str:
    lines = ["| model | weights | `--max-memory` | peak memory | seconds |", "|---|---|---|---|---|"]
    for name in (name for name in LIMITS if name in results):
        row = results[name]
        lines.append(
            f"| {name} | {row['weights'] / 2**30:.1f} GiB | {LIMITS[name]} "
            f"| {row['peak_mib'] / 1024:.1f} GiB | {row['seconds']:.0f} |"
        )
    measured = next(results[name]["machine"] for name in LIMITS if name in results)
    return "\n".join([*lines, "", f"{measured['cpu']}, {measured['cores']} cores; `python -m benchmarks.sizes`."])


if __name__ == "__main__":
    main()
