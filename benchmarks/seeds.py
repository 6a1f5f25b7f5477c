"""What samples bring, and how far the seed moves what a prune gives: a model without a fifth of its decoder.

    LLMPRUNER_DATA=… LLMPRUNER_MODELS=… python -m benchmarks.seeds [--model NAME] [--seeds 0 1 2] [--checkout FOLDER]
        [-- OPTIONS OF prune]
    python -m benchmarks.seeds --render

Each row is one `llmpruner prune --ratio 0.2` in a process of its own, by this version or by the one in FOLDER, then the
divergence from the dense model on the texts of `benchmarks.quality`. Rows are kept in ``results/seeds.jsonl``; the
table in ``docs/how-to/prune.md`` has the means over the seeds of one commit and number of samples, how far a seed is
above the mean on any text, and the minutes that the run said before.
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

from .measure import data_folder, machine, run, write_table
from .quality import COLUMNS, MODELS, ROOT, measured_on

RESULTS = ROOT / "benchmarks" / "results" / "seeds.jsonl"
PAGE = ROOT / "docs" / "how-to" / "prune.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--checkout", type=Path, default=ROOT, help="the version to run")
    parser.add_argument("--render", action="store_true", help="only write the table")
    parser.add_argument("options", nargs="*", help="of `llmpruner prune`")
    arguments = parser.parse_args()
    for seed in () if arguments.render else arguments.seeds:
        row = measure(arguments.model, seed, arguments.checkout, arguments.options)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    write_table(PAGE, "samples", table(read()))


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def measure(model: str, seed: int, checkout: Path, options: list[str]) -> dict[str, Any]:
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%h", "--", "llmpruner"]
    head, dense = subprocess.run(command, capture_output=True, text=True, check=True), str(MODELS[model]())
    with tempfile.TemporaryDirectory() as work:
        output = str(Path(work) / "pruned")
        arguments = ("prune", dense, "--ratio", "0.2", "--set", f"prune.seed={seed}", *options, "-o", output, "--json")
        done = run(*arguments, checkout=checkout, timeout=4 * 3600)
        said, stages = json.loads(done["output"]), json.loads((Path(output) / "run.json").read_text())["stages"]
        texts = measured_on(dense, output, data_folder())["texts"]
    return {
        "model": model, "commit": head.stdout.strip(), "options": options, "seed": seed,
        "samples": said["plan"]["compensation"]["samples"], "said": said["forecast"].get("seconds"),
        "seconds": done["seconds"], "peak_mib": done["peak_mib"], "stages": {s["name"]: s["seconds"] for s in stages},
        "machine": machine(), "kl": {name: texts[name]["kl_per_token"] for name in COLUMNS},
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    together: defaultdict[tuple[str, int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        together[" ".join([row["model"], *row["options"]]), row["samples"], row["commit"]].append(row)
    lines = ["| model | samples | seeds | divergence | worst | minutes | said | GiB | commit |", "|---" * 9 + "|"]
    order = [*MODELS]
    for (model, samples, commit), same in sorted(together.items(), key=lambda each: order.index(each[0][0].split()[0])):
        means = {name: fmean(row["kl"][name] for row in same) for name in COLUMNS}
        worst = max(row["kl"][name] / means[name] - 1 for row in same for name in COLUMNS)
        took, said = ([row[key] / 60 for row in same if row.get(key)] for key in ("seconds", "said"))
        cells = [model, str(samples), str(len(same)), f"{fmean(means.values()):.3f}", f"+{worst:.0%}" if worst else "–"]
        cells += [f"{fmean(took):.1f}", f"{fmean(said):.1f}" if said else "–"]
        cells += [f"{max(row['peak_mib'] for row in same) / 1024:.1f}", commit]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
