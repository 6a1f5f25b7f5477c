"""Memory and time of a prune against the size of the model: random LLaMAs of 0.2 to 13 billion parameters, streamed
from their files.

    LLMPRUNER_DATA=… python -m benchmarks.sizes [ROW …]

``ROW``: of `ROWS`; the others keep their results. Writes ``results/sizes.json`` and the table in
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
ROWS = {
    "wide": ("llm-pruner", "1GiB"),
    "1b": ("llm-pruner", "2GiB"),
    "3b": ("llm-pruner", "3GiB"),
    "7b": ("llm-pruner", "4GiB"),
    "13b": ("llm-pruner", "6GiB"),
    "7b, best": ("best --samples 32", "6GiB"),
}
"""Shape of `benchmarks.shapes`, before a comma → ``--method`` and what goes with it, and ``--max-memory``."""
TEXT = "wikitext2_unk_validation.jsonl"
"""Of the data folder. Text that a model writes takes a pass over all weights for every token."""


def main() -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in sys.argv[1:] or list(ROWS):
        results[name] = {"machine": machine(), **pruned(name)}
        RESULTS.write_text(as_json(results))
        print(name, results[name]["seconds"], results[name]["peak_mib"])
    write_table(PAGE, "sizes", table(results))


def pruned(name: str) -> dict[str, Any]:
    """One prune of a random model."""
    text, (method, limit) = data_folder() / TEXT, ROWS[name]
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / name.partition(",")[0]
        subprocess.run([sys.executable, "-m", "benchmarks.shapes", model.name, str(model)], check=True)
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        options = ("--method", *method.split(), "--ratio", "0.2", "--max-memory", limit, "--json")
        done = run("prune", str(model), *options, "--calibration", str(text), "-o", f"{work}/out", timeout=4 * 3600)
    said = json.loads(done.pop("output"))["forecast"].get("seconds")
    command = done["command"].replace(work, "$WORK").replace(str(text.parent), "$LLMPRUNER_DATA")
    return {**done, "command": command, "weights": weights, "said": said}


def table(results: dict[str, Any]) -> str:
    lines = ["| model | weights | method | `--max-memory` | peak memory | seconds | said before |", "|---" * 7 + "|"]
    for name in (name for name in ROWS if name in results):
        row, (method, limit) = results[name], ROWS[name]
        said = row.get("said")
        lines.append(
            f"| {name.partition(',')[0]} | {row['weights'] / 2**30:.1f} GiB | {method} | {limit} "
            f"| {row['peak_mib'] / 1024:.1f} GiB | {row['seconds']:.0f} | {f'{said:.0f}' if said else '–'} |"
        )
    measured = next(results[name]["machine"] for name in ROWS if name in results)
    return "\n".join([*lines, "", f"{measured['cpu']}, {measured['cores']} cores; `python -m benchmarks.sizes`."])


if __name__ == "__main__":
    main()
