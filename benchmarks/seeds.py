"""How far the seed moves what a prune gives: the demo model without a fifth of its decoder, by several seeds.

    LLMPRUNER_DATA=… python -m benchmarks.seeds [--seeds 0 1 2] [--checkout FOLDER] [-- OPTIONS OF prune]
    python -m benchmarks.seeds --render

Each row is one `llmpruner prune demo --ratio 0.2` in a process of its own, by this version or by the one in FOLDER,
then the divergence from the dense model on the texts of `benchmarks.quality`. Rows are kept in ``results/seeds.jsonl``;
the table has the means over the seeds of one commit and options, and how far a seed is above the mean on any text.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from .measure import data_folder, machine, run
from .quality import COLUMNS, ROOT, measured_on

RESULTS = ROOT / "benchmarks" / "results" / "seeds.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--checkout", type=Path, default=ROOT, help="the version to run")
    parser.add_argument("--render", action="store_true", help="only print the table")
    parser.add_argument("options", nargs="*", help="of `llmpruner prune`")
    arguments = parser.parse_args()
    for seed in () if arguments.render else arguments.seeds:
        row = measure(seed, arguments.checkout, arguments.options)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    print(table([json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]))


def measure(seed: int, checkout: Path, options: list[str]) -> dict[str, Any]:
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%h", "--", "llmpruner"]
    head = subprocess.run(command, capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory() as work:
        output = str(Path(work) / "pruned")
        arguments = ("prune", "demo", "--ratio", "0.2", "--set", f"prune.seed={seed}", *options, "-o", output)
        done = run(*arguments, checkout=checkout)
        stages = {
            stage["name"]: stage["seconds"] for stage in json.loads((Path(output) / "run.json").read_text())["stages"]
        }
        texts = measured_on("demo", output, data_folder())["texts"]
    return {
        "commit": head.stdout.strip(), "options": options, "seed": seed, "seconds": done["seconds"],
        "peak_mib": done["peak_mib"], "stages": stages, "machine": machine(),
        "kl": {name: texts[name]["kl_per_token"] for name in COLUMNS},
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    together: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        together[row["commit"], " ".join(row["options"])].append(row)
    lines = [f"| commit | options | seeds | {' | '.join(COLUMNS.values())} | mean | worst | seconds | MiB |"]
    lines.append("|---" * (len(COLUMNS) + 7) + "|")
    for (commit, options), same in together.items():
        means = {name: fmean(row["kl"][name] for row in same) for name in COLUMNS}
        worst = max(row["kl"][name] / means[name] - 1 for row in same for name in COLUMNS)
        cells = [commit, options or "–", str(len(same)), *(f"{mean:.3f}" for mean in means.values())]
        cells += [f"{fmean(means.values()):.3f}", f"+{worst:.0%}", f"{fmean(row['seconds'] for row in same):.0f}"]
        lines.append(f"| {' | '.join([*cells, str(max(row['peak_mib'] for row in same))])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
