"""The paper's own criteria on the real model, three seeds each: L2 ≫ random > vector > element1.

    LLMPRUNER_DATA=… python -m benchmarks.ordering

Everything but the criterion is that of ``--method llm-pruner``: ten samples of 64 tokens, no compensation. Results are
kept in ``results/ordering.json``, so an interrupted run goes on where it stopped; ``benchmarks.quality`` puts them
into ``docs/quality.md``.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from .measure import as_json, data_folder, machine, measured, run

RESULTS = Path(__file__).parent / "results" / "ordering.json"
SEEDS = (0, 1, 2)
CRITERIA = {
    "l2": ("--importance", "l2"),
    "random": ("--importance", "random"),
    "taylor vector": ("--importance", "taylor", "--variant", "vector"),
    "taylor element1": (),
}


def main() -> None:
    data = data_folder()
    results = read()
    results["machine"] = machine()
    found: dict[str, dict[str, float]] = results.setdefault("perplexity", {})
    for seed in SEEDS:
        for name, options in CRITERIA.items():
            of_seed = found.setdefault(name, {})
            # What weights alone say is the same for every seed.
            if str(seed) in of_seed or (name == "l2" and seed != SEEDS[0]):
                continue
            of_seed[str(seed)] = _perplexity(data, seed, *options)
            RESULTS.write_text(as_json(results), encoding="utf-8")
            print(name, seed, of_seed[str(seed)], flush=True)


def read() -> dict[str, Any]:
    known: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    return known


def _perplexity(data: Path, seed: int, *options: str) -> float:
    text = str(data / "wikitext2_unk_validation.jsonl")
    with tempfile.TemporaryDirectory() as work:
        pruned = str(Path(work) / "pruned")
        where = ("--kinds", "mlp", "--layers", "3-26", "--shape", "free", "--ratio", "0.2", "--dtype", "float32")
        on = ("--calibration", text, "--seed", str(seed), "-o", pruned)
        run("prune", "demo", "--method", "llm-pruner", *options, *where, *on)
        return measured(pruned, data / "wikitext2_unk_test.txt", Path(work), kl=False)["perplexity"]


def table(results: dict[str, Any]) -> list[str]:
    """Rows of a table for ``docs/quality.md``."""
    lines = ["| criterion | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " |", "|---" * (len(SEEDS) + 1) + "|"]
    for name, found in results["perplexity"].items():
        missing = "the same" if name == "l2" else "not measured"
        cells = [f"{found[str(seed)]:.2f}" if str(seed) in found else missing for seed in SEEDS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
