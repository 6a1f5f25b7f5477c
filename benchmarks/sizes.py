"""Memory and time of a prune against the size of the model: random LLaMAs of 0.2 to 13 billion parameters, read layer
by layer, and what the forecast says for larger ones.

    LLMPRUNER_DATA=… python -m benchmarks.sizes [SHAPE …]
    LLMPRUNER_DATA=… python -m benchmarks.sizes --draw

``SHAPE``: of `LIMITS`; the others keep their results. ``--draw`` measures nothing. Writes ``results/sizes.json``, the
table in ``docs/how-to/scale.md`` and its plot. Needs an idle machine, and for 13B 50 GB of disk. LLMPRUNER_SHAPES is a
folder with models that were written before.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import plots
from .measure import as_json, data_folder, machine, run

RESULTS = Path(__file__).parent / "results" / "sizes.json"
PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "scale.md"
PLOT = Path(__file__).parents[1] / "docs" / "pictures" / "sizes.svg"
BEGIN, END = "<!-- sizes:begin -->", "<!-- sizes:end -->"
LIMITS = {"wide": "1GiB", "1b": "2GiB", "3b": "3GiB", "7b": "4GiB", "13b": "6GiB"}
"""Shapes of `benchmarks.shapes`, and ``--max-memory``."""
LARGER = ("70b", "480b-moe")
METHOD = {"method": "llm-pruner", "ratio": 0.2}
TEXT = "wikitext2_unk_validation.jsonl"
"""Of the data folder. Text that a model writes takes a pass over all weights for every token."""


def main() -> None:
    names = sys.argv[1:] or list(LIMITS)
    if names[0] == "--larger":
        print(json.dumps(larger(names[1])))
        return
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in names if names != ["--draw"] else []:
        results[name] = {"machine": machine(), **pruned(name)}
        RESULTS.write_text(as_json(results))
        print(name, results[name]["seconds"], results[name]["peak_mib"])
    for name in LARGER:
        # In a process of its own, which may take memory.
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.sizes", "--larger", name], check=True, capture_output=True, text=True
        )
        results[name] = json.loads(done.stdout)
    RESULTS.write_text(as_json(results))
    write_page(results)
    draw(results)


def pruned(name: str) -> dict[str, Any]:
    """One prune of a random model, with what was forecast."""
    with tempfile.TemporaryDirectory() as work:
        kept = Path(os.environ.get("LLMPRUNER_SHAPES", work)) / name
        model = kept if kept.is_dir() else Path(work) / name
        if not model.is_dir():
            subprocess.run([sys.executable, "-m", "benchmarks.shapes", name, str(model)], check=True)
        out = Path(work) / "out"
        text = data_folder() / TEXT
        options = [word for key, value in METHOD.items() for word in (f"--{key}", str(value))]
        limit = ("--max-memory", LIMITS[name])
        done = run("prune", str(model), *options, "--calibration", str(text), *limit, "-o", str(out), "--json")
        shutil.rmtree(out)
        found = json.loads(done.pop("output"))
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        done["command"] = done["command"].replace(str(model), f"$WORK/{name}").replace(work, "$WORK")
        done["command"] = done["command"].replace(str(text.parent), "$LLMPRUNER_DATA")
    forecast = found["forecast"]
    return {
        **done,
        "weights": weights,
        "streamed": forecast["streamed"],
        "forecast": {"memory": forecast["memory"], "seconds": forecast["seconds"]},
        "forecast / used": {
            "memory": round(forecast["memory"] / (done["peak_mib"] * 2**20), 3),
            "seconds": round(forecast["seconds"] / forecast["used"]["seconds"], 3),
        },
    }


def larger(name: str) -> dict[str, Any]:
    """The forecast for a model of which only the configuration exists. The time is not part of it, as no layer is run:
    it is that of the largest measured model of the same kind, in proportion to the weights."""
    import psutil
    import torch

    from llmpruner import Catalog, PruneSettings, api, plugin_manager
    from llmpruner.engine.boundaries import DEFAULT_LIMIT
    from llmpruner.recipes.forecast import Residency
    from llmpruner.recipes.forecasting import forecast
    from llmpruner.recipes.jobs import prune_job
    from llmpruner.recipes.work import work_of
    from llmpruner.settings import settings_from

    from .shapes import config_of

    catalog = Catalog(plugin_manager())
    with tempfile.TemporaryDirectory() as work:
        config_of(name).save_pretrained(work)
        structure = api.discover(work, catalog=catalog)
    settings = settings_from(PruneSettings, {**METHOD, "calibration": str(data_folder() / TEXT)})
    job = prune_job(settings, catalog)
    expected = forecast(
        structure, work_of(job, structure, saves=True), torch.bfloat16, Residency(True, DEFAULT_LIMIT), None,
        base=psutil.Process().memory_info().rss,
    )  # fmt: skip
    parameters = structure.graph.total_parameters
    return {"parameters": parameters, "weights": 2 * parameters, "memory": expected.memory, "disk": expected.disk}


def extrapolated(results: dict[str, Any]) -> float | None:
    """Seconds per byte of weights of the largest measured model."""
    found = [(results[name]["weights"], results[name]["seconds"]) for name in LIMITS if name in results]
    return max(found)[1] / max(found)[0] if found else None


def write_page(results: dict[str, Any]) -> None:
    rate = extrapolated(results)
    lines = [
        "Random LLaMAs in bfloat16, `prune --method llm-pruner --ratio 0.2` on ten samples of 64 tokens of WikiText-2, "
        "read layer by layer. The largest models were not run: their memory is what the forecast says, their time that "
        "of the largest measured model in proportion to the weights.",
        "",
        "![Peak memory and minutes against the number of parameters](../pictures/sizes.svg)",
        "",
        "| model | weights | `--max-memory` | peak memory | seconds | forecast: memory, seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, limit in LIMITS.items():
        if name in results:
            row = results[name]
            ratio = row["forecast / used"]
            lines.append(
                f"| {name} | {row['weights'] / 2**30:.1f} GiB | {limit} | {row['peak_mib'] / 1024:.2f} GiB | "
                f"{row['seconds']:.0f} | {ratio['memory']:.2f} ×, {ratio['seconds']:.2f} × of what was used |"
            )
    for name in LARGER:
        row = results[name]
        hours = "" if rate is None else f"{rate * row['weights'] / 3600:.1f} h"
        sizes = f"{row['weights'] / 2**30:.0f} GiB | | {row['memory'] / 2**30:.1f} GiB"
        lines.append(f"| {name}, extrapolated | {sizes} | {hours} | |")
    measured = next(results[name]["machine"] for name in LIMITS if name in results)
    lines += ["", f"{measured['cpu']}, {measured['cores']} cores; `python -m benchmarks.sizes`."]
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


def draw(results: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    rate = extrapolated(results)
    rows = [results[name] for name in LIMITS if name in results]
    x = [row["weights"] / 2e9 for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4))
    left.plot(x, [row["peak_mib"] / 1024 for row in rows], "o-", label="measured")
    right.plot(x, [row["seconds"] / 60 for row in rows], "o-", label="measured")
    far = [results[name] for name in LARGER]
    beyond = [row["weights"] / 2e9 for row in far]
    left.plot(beyond, [row["memory"] / 2**30 for row in far], "o", mfc="none", label="forecast")
    if rate is not None:
        right.plot(beyond, [rate * row["weights"] / 60 for row in far], "o", mfc="none", label="extrapolated")
    left.plot(x + beyond, [2e9 * value / 2**30 for value in x + beyond], ":", color="gray", label="the weights")
    left.set(ylabel="peak memory, GiB", title="memory")
    right.set(ylabel="minutes", title="time")
    for axes in (left, right):
        axes.set(xlabel="billion parameters", xscale="log", yscale="log")
    plots.save(figure, PLOT)


if __name__ == "__main__":
    main()
