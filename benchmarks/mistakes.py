"""Seconds until ten mistaken commands are answered, and what they are answered.

    python -m benchmarks.mistakes

Writes ``benchmarks/results/mistakes.json``: the median of three runs of each, on a model that no command has to read.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from .measure import as_json, commit, machine

RESULTS = Path(__file__).parent / "results" / "mistakes.json"
MISTAKES = (
    "prune model --ratio 20 -o out",
    "prune model --sparsity 0.2 -o out",
    "prune model --target-params 0.4 -o out",
    "prune model --ratio 0.2 --kinds heads -o out",
    "prune model --ratio 0.2 --method bst -o out",
    "prune model --ratio 0.2 --calibration model -o out",
    "prune model --ratio 0.2 --calibration alpaca.jsonl -o out",
    "prune nowhere/ --ratio 0.2 -o out",
    "recover model -o out",
    "export model --to GGUF -o out",
)
RUNS = 3


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
        (folder / "alpaca.jsonl").write_text(json.dumps({"instruction": "Add 2 and 2.", "input": "", "output": "4"}))
        for mistake in MISTAKES:
            seconds = []
            for _ in range(RUNS):
                began = time.perf_counter()
                command = [sys.executable, "-m", "llmpruner", *shlex.split(mistake)]
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
                seconds.append(round(time.perf_counter() - began, 2))
                assert done.returncode == 2, (mistake, done)
            rows.append({"command": f"llmpruner {mistake}", "seconds": median(seconds), "message": done.stderr.strip()})
            print(f"{median(seconds):5.2f} s  llmpruner {mistake}\n         {done.stderr.strip()}", flush=True)
    middle = round(median(row["seconds"] for row in rows), 2)
    print(f"{middle:5.2f} s  median")
    made_by = "python -m benchmarks.mistakes"
    result = {
        "command": made_by,
        "commit": commit(Path(__file__).parents[1]),
        "machine": machine(),
        "median_seconds": middle,
        "mistakes": rows,
    }
    RESULTS.write_text(as_json(result))


if __name__ == "__main__":
    main()
