"""Two processes with one thread each against one process with one thread: seconds, and the same result.

    python -m benchmarks.ranks [--model demo] [--processes 2] [--rounds 2] [--samples 320] [--method best]

Measured is what the processes share: scores, selection, compensation and cut; not loading, reading text and saving.
Runs alternate; the least seconds of each count. The machine must have a free core for each process. Writes
``results/ranks.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from .measure import as_json, data_folder, machine

RESULTS = Path(__file__).parent / "results" / "ranks.json"
METHODS: dict[str, dict[str, Any]] = {
    "best": {"method": "best", "length": 512},
    "taylor": {"importance": "taylor", "variant": "element1", "samples": 64, "length": 256},
}
"""Name → settings of a prune at 20 %; ``--samples`` sets those that are not here."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="a model with a tokenizer")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--method", choices=METHODS, help="only this one; writes nothing")
    options = parser.parse_args()
    if options.worker is not None:
        work(options.model, options.method, options.samples, options.worker)
        return
    names = [options.method] if options.method else list(METHODS)
    rows = [compare(name, options) for name in names]
    results = {"machine": machine(), "model": options.model, "rows": rows}
    if not options.method:
        RESULTS.write_text(as_json(results), encoding="utf-8")
    print(as_json(results))
    if not all(row["same plan"] for row in rows):
        raise SystemExit("the plans differ")


def compare(method: str, options: argparse.Namespace) -> dict[str, Any]:
    counts = (1, options.processes)
    with tempfile.TemporaryDirectory() as folder:
        found = [
            {n: start(method, n, options, Path(folder) / f"{n}.pt") for n in counts} for _ in range(options.rounds)
        ]
        one, many = (Path(folder) / f"{n}.pt" for n in counts)
        absolute, relative = differences(one, many)
    seconds, cpu = ({n: min(run[n][what] for run in found) for n in counts} for what in ("seconds", "cpu"))
    return {
        "method": method,
        "samples": METHODS[method].get("samples", options.samples),
        "seconds of one process": seconds[1],
        f"seconds of {options.processes} processes": seconds[options.processes],
        "speed-up": round(seconds[1] / seconds[options.processes], 2),
        "CPU seconds of one process": cpu[1],
        f"CPU seconds of the busiest of {options.processes}": cpu[options.processes],
        "same plan": len({run[n]["plan"] for run in found for n in counts}) == 1,
        "largest difference of weights": absolute,
        "largest relative difference of a tensor": relative,
    }


def start(method: str, processes: int, options: argparse.Namespace, file: Path) -> dict[str, Any]:
    """One run in processes of its own; each has one thread."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []
    arguments = ["--worker", file, "--method", method, "--model", options.model, "--samples", options.samples]
    command = [sys.executable, "-m", *launcher, "benchmarks.ranks", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(file.with_suffix(".json").read_text())
    print(f"{method}, {processes}: {found['seconds']} s", file=sys.stderr)
    return found


def work(model: str, method: str, samples: int, file: Path) -> None:
    """In each process: prune in memory, and write the seconds, the plan's checksum and the weights."""
    import torch

    from llmpruner import CalibrationSource, Catalog, PruneSettings, api, plugin_manager
    from llmpruner.calibration.calibration import CalibrationText, Part
    from llmpruner.engine.ranks import Ranks
    from llmpruner.recipes.calibrating import calibrate
    from llmpruner.recipes.execution import Run
    from llmpruner.recipes.jobs import prune_job
    from llmpruner.recipes.pipeline import apply_draft, draft_plan
    from llmpruner.settings import settings_from

    class Given(CalibrationSource):
        """Tokens that were read before."""

        name = "given"
        tokens: torch.Tensor

        def sample(self, task: Any) -> torch.Tensor:
            return self.tokens[: task.samples, : task.length]

    torch.set_num_threads(1)
    ranks, catalog = Ranks.current(), Catalog(plugin_manager())
    text = str(data_folder() / "wikitext2_unk_validation.jsonl")
    settings = {"ratio": 0.2, "calibration": text, "samples": samples, **METHODS[method]}
    loaded = api.load(model, catalog=catalog)
    job = prune_job(settings_from(PruneSettings, settings), catalog)
    assert job.calibration is not None
    source, read = Given(), calibrate(loaded, job)
    assert read is not None
    source.tokens = read.input_ids
    job = replace(job, calibration=replace(job.calibration, text=CalibrationText("given", (Part(source, ""),))))
    run = Run(ranks=ranks)
    ranks.wait()
    started, used = time.monotonic(), time.process_time()
    pruned = apply_draft(loaded, draft_plan(loaded, job, run=run), catalog, run=run)
    ranks.wait()
    seconds = round(time.monotonic() - started, 2)
    busiest = max(ranks.merged({ranks.rank: round(time.process_time() - used, 2)}).values())
    if ranks.first:
        torch.save(pruned.model.state_dict(), file)
        kept = json.dumps({name: list(units) for name, units in pruned.plans[-1].kept.items()}, sort_keys=True)
        result = {"seconds": seconds, "cpu": busiest, "plan": hashlib.sha256(kept.encode()).hexdigest()}
        file.with_suffix(".json").write_text(json.dumps(result))
    ranks.wait()
    ranks.leave()


def differences(one: Path, other: Path) -> tuple[float, float]:
    """The largest difference of a weight, and of a tensor relative to its norm."""
    import torch

    ours, theirs = torch.load(one), torch.load(other)
    pairs = [(ours[name].double(), theirs[name].double()) for name in ours if ours[name].shape == theirs[name].shape]
    absolute = max(float((a - b).abs().max()) for a, b in pairs)
    return absolute, max(float((a - b).norm() / a.norm().clamp_min(1e-30)) for a, b in pairs)


if __name__ == "__main__":
    main()
