"""Peak memory and held-out losses of a sharded training in two processes, against one process: a random LLaMA of 150
million parameters in float32, every one of which is trained.

    LLMPRUNER_DATA=… python -m benchmarks.sharded

Writes ``results/sharded.json``. The peak is that of the whole process, with some 0.4 GiB of libraries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .measure import as_json, data_folder, machine

RESULTS = Path(__file__).parent / "results" / "sharded.json"
SETTINGS: dict[str, Any] = {
    "strategy": "full", "max_steps": 4, "batch_size": 4, "micro_batch_size": 1, "cutoff": 64, "limit": 24,
    "validation": 8, "learning_rate": 1e-5,
}  # fmt: skip

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""So that freed memory goes back to the system, and the peak is what is in use."""


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        subprocess.run([sys.executable, "-m", "benchmarks.shapes", "small", str(model), "float32"], check=True)
        one, two = trained(model, 1), trained(model, 2)
    ratio = max(each["peak_mib"] for each in two) / one[0]["peak_mib"]
    losses = [[each["loss"] for each in done[0]["validation"]] for done in (one, two)]
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    result = {"machine": machine(), "settings": SETTINGS, "one": one, "two": two, "peak_ratio": round(ratio, 3)}
    RESULTS.write_text(as_json({**result, "largest_difference_of_losses": difference}))
    print(f"peak of a process {ratio:.3f} of that of one alone; held-out losses differ by {difference:.1e} at most")


def trained(model: Path, processes: int) -> list[dict[str, Any]]:
    """What each of some processes measured."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    output = model.parent / f"{processes}"
    worker = ["-m", "benchmarks.sharded", str(model), str(output)]
    done = [sys.executable, *(launcher if processes > 1 else []), *worker]
    subprocess.run(done, check=True, env={**os.environ, **ENVIRONMENT})
    return [json.loads(Path(f"{output}-{rank}.json").read_text()) for rank in range(processes)]


def work(model: str, output: str) -> None:
    """In each process. Linux counts what a parent holds into its child's peak, so that no torch is imported above."""
    import llmpruner
    from llmpruner.engine.ranks import Ranks
    from llmpruner.engine.stages import peak_memory

    ranks = Ranks.current()
    settings = {**SETTINGS, "data": str(data_folder() / "alpaca_gpt4_en_999.jsonl"), "sharded": ranks.count > 1}
    record = llmpruner.recover(model, output=output, **settings).record or {}
    (recovery,) = record["recovery"]
    peak = (peak_memory() or 0) >> 20
    file = Path(f"{output}-{ranks.rank}.json")
    file.write_text(json.dumps({"peak_mib": peak, "validation": recovery["validation"], "losses": recovery["losses"]}))
    ranks.wait()
    ranks.leave()


if __name__ == "__main__":
    work(*sys.argv[1:]) if len(sys.argv) > 1 else main()
