"""Memory and time of the engine: large models on a small machine.

    python -m benchmarks.engine OLD_CHECKOUT [PART …]

``OLD_CHECKOUT``: a checkout of the version to compare with, run by the same interpreter. Parts: ``7b`` (LLaMA-7B's
shape, random weights: the paper's method, old and new in turn), ``7b-best`` (``best``, over an hour), ``moe``
(OLMoE's shape: half of the experts), ``qwen`` (``best`` on a real model of 1.5 billion parameters, see
`benchmarks.real_models`), ``1b`` (against `benchmarks.textbook`), ``demo`` (``best`` on the demo model, old
and new in turn), ``default`` (no option but the ratio: the model writes its calibration text first). Writes
``benchmarks/results/engine.json``; parts that are not named keep their results. Needs 45 GB of disk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from . import real_models
from .measure import as_json, data_folder, machine
from .same_results import PACKAGES

RESULTS = Path(__file__).parent / "results" / "engine.json"
ROOT = Path(__file__).resolve().parents[1]
LIMIT, QWEN_LIMIT = "4GiB", "3GiB"
ROUNDS = 1
"""Pairs of runs, in turn."""
TEXTBOOK_LIMITS = {"bfloat16": "1.3GiB", "float32": "2.4GiB"}
"""Dtype → ``--max-memory``: about a quarter of what the textbook takes."""


def main() -> None:
    old, parts = Path(sys.argv[1]).resolve(), sys.argv[2:] or ["demo", "default", "1b", "moe", "qwen", "7b", "7b-best"]
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as work:
        for part in parts:
            found = globals()[f"measure_{part.replace('-', '_')}"](Path(work), old)
            results[part] = {"machine": machine(), "threads": os.environ.get("OMP_NUM_THREADS"), **found}
            RESULTS.write_text(
                as_json(results)
                .replace(os.environ.get("LLMPRUNER_SHAPES", work), "$WORK")
                .replace(work, "$WORK")
                .replace(str(old), "OLD_CHECKOUT")
            )


def measure_7b(work: Path, old: Path) -> dict[str, Any]:
    model = shape(work, "7b")
    llm_pruner = ("prune", model, "--method", "llm-pruner", "--ratio", "0.2", "--no-tokenizer")
    found = {"old llm-pruner": command(old, *llm_pruner, "-o", str(work / "old"))}
    shutil.rmtree(work / "old")
    found["llm-pruner"] = command(ROOT, *llm_pruner, "-o", str(work / "new"), "--max-memory", LIMIT)
    found["generates"] = generates(work / "new")
    found["stages"] = stages(work / "new")
    shutil.rmtree(work / "new")
    ours, theirs = found["llm-pruner"], found["old llm-pruner"]
    return {**found, **ratios([ours], [theirs])}


_BEST = ("--method", "best", "--importance", "energy")
"""By the criterion that the default had when these were measured first."""


def measure_7b_best(work: Path, old: Path) -> dict[str, Any]:
    del old
    model, text = shape(work, "7b"), str(data_folder() / "wikitext2_unk_validation.jsonl")
    best = ("prune", model, *_BEST, "--samples", "16", "--ratio", "0.2")
    out = work / "best"
    found = command(ROOT, *best, "--calibration", text, "-o", str(out), "--max-memory", LIMIT)
    found["generates"] = generates(out)
    found["stages"] = stages(out)
    shutil.rmtree(out)
    return without_place({"best": found})


def measure_qwen(work: Path, old: Path) -> dict[str, Any]:
    del old
    model, text = str(real_models.qwen(size="1.5b")), str(data_folder() / "wikitext2_unk_validation.jsonl")
    best = ("prune", model, *_BEST, "--samples", "16", "--ratio", "0.2", "--dtype", "bfloat16")
    out = work / "qwen"
    found = command(ROOT, *best, "--calibration", text, "-o", str(out), "--max-memory", QWEN_LIMIT)
    found["generates"] = generates(out)
    found["stages"] = stages(out)
    found["command"] = found["command"].replace(model, "$LLMPRUNER_MODELS/qwen-1.5b/model.gguf")
    shutil.rmtree(out)
    return without_place({"best": found})


def measure_moe(work: Path, old: Path) -> dict[str, Any]:
    del old
    model, text = shape(work, "moe-7b"), str(data_folder() / "wikitext2_unk_validation.jsonl")
    half = ("prune", model, "--kinds", "expert", "--unit-ratio", "0.5", "--layers", "all", "--calibration", text)
    found = {}
    for criterion in ("expert-reap", "taylor"):
        options = ("--importance", criterion, "--max-memory", LIMIT)
        found[criterion] = command(ROOT, *half, *options, "-o", str(work / "new"))
        found[criterion]["generates"] = generates(work / "new")
        shutil.rmtree(work / "new")
    return without_place(found)


def measure_1b(work: Path, old: Path) -> dict[str, Any]:
    """Both read the same tokens of a text, choose channels, cut, and save. The units are compared in float32: in
    bfloat16, rounding decides between units of random weights, whose scores are nearly equal."""
    del old
    text = str(data_folder() / "wikitext2_unk_validation.jsonl")
    found = {}
    for dtype, limit in TEXTBOOK_LIMITS.items():
        model, tokens = shape(work, "1b", dtype), work / "calibration.json"
        tokens.write_text(json.dumps(calibration_of(model, text)))
        prune = ("prune", model, "--method", "llm-pruner", "--ratio", "0.2", "--calibration", text)
        ours, theirs = [], []
        for number in range(ROUNDS):
            out, other = work / f"{dtype}-{number}", work / f"{dtype}-{number}-textbook"
            theirs.append(run(["-m", "benchmarks.textbook", model, str(tokens), str(other)], ROOT))
            ours.append(command(ROOT, *prune, "-o", str(out), "--max-memory", limit))
        plan = json.loads((out / "llmpruner.json").read_text())["plans"][0]
        kept = {str(cut["layer"]): set(expanded(cut["kept"])) for cut in plan["cuts"].values()}
        wanted = {layer: set(units) for layer, units in json.loads((other / "kept.json").read_text()).items()}
        found[dtype] = {
            "llm-pruner": ours,
            "textbook": theirs,
            "kept": [sum(map(len, units.values())) for units in (kept, wanted)],
            "kept by the textbook alone": sum(len(units - kept[layer]) for layer, units in wanted.items()),
            **ratios(ours, theirs),
        }
    return without_place(found)


def measure_demo(work: Path, old: Path) -> dict[str, Any]:
    text = str(data_folder() / "wikitext2_unk_validation.jsonl")
    best = ("prune", "demo", "--ratio", "0.2", "--calibration", text)
    ours, theirs = [], []
    for number in range(ROUNDS):
        theirs.append(command(old, *best, "-o", str(work / f"old-{number}")))
        # The old version knows no other shape. Uniform widths cut, and so repair, the first and last layers too.
        ours.append(command(ROOT, *best, "--shape", "free", "-o", str(work / f"new-{number}")))
    return without_place({"best, free": ours, "old best": theirs, **ratios(ours, theirs)})


def without_place(found: dict[str, Any]) -> dict[str, Any]:
    """With the data folder's name instead of its path."""
    named: dict[str, Any] = json.loads(json.dumps(found).replace(str(data_folder()), "$LLMPRUNER_DATA"))
    return named


def measure_default(work: Path, old: Path) -> dict[str, Any]:
    del old
    default = ("prune", "demo", "--ratio", "0.2", "-o", str(work / "default"))
    return {"best, text that the model writes": command(ROOT, *default)}


def ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, float]:
    """Ours by theirs: medians of seconds and CPU seconds, largest peaks."""

    def middle(runs: list[dict[str, Any]], key: str) -> float:
        return median(run[key] for run in runs)

    return {
        "seconds ratio": round(middle(ours, "seconds") / middle(theirs, "seconds"), 3),
        "cpu seconds ratio": round(middle(ours, "cpu_seconds") / middle(theirs, "cpu_seconds"), 3),
        "peak ratio": round(max(r["peak_gib"] for r in ours) / max(r["peak_gib"] for r in theirs), 3),
    }


def shape(work: Path, name: str, dtype: str = "bfloat16") -> str:
    """A random checkpoint of a shape of `benchmarks.shapes`; from ``$LLMPRUNER_SHAPES``, if it is there."""
    own = name if dtype == "bfloat16" else f"{name}-{dtype}"
    kept = Path(os.environ.get("LLMPRUNER_SHAPES", work)) / own
    folder = kept if kept.is_dir() else work / own
    if not folder.is_dir():
        run(["-m", "benchmarks.shapes", name, str(folder), dtype], ROOT)
    return str(folder)


def calibration_of(model: str, text: str) -> list[list[int]]:
    """The tokens that ``--method llm-pruner`` reads from a text."""
    script = (
        "import json, sys; from llmpruner import Catalog, PruneSettings, api, plugin_manager; "
        "from llmpruner.recipes.jobs import prune_job; from llmpruner.recipes.calibrating import calibrate; "
        "from llmpruner.settings import settings_from; "
        "settings = settings_from(PruneSettings, {'method': 'llm-pruner', 'ratio': 0.2, 'calibration': sys.argv[2]}); "
        "job = prune_job(settings, Catalog(plugin_manager())); "
        "print(json.dumps(calibrate(api.load(sys.argv[1]), job).input_ids.tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", script, model, text], check=True, capture_output=True, text=True)
    found: list[list[int]] = json.loads(done.stdout)
    return found


def expanded(kept: str) -> list[int]:
    """The numbers in ``0-3,7``."""
    found: list[int] = []
    for part in kept.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def stages(folder: Path) -> dict[str, float]:
    """Seconds of each stage of the prune that wrote ``folder``."""
    return {stage["name"]: stage["seconds"] for stage in json.loads((folder / "run.json").read_text())["stages"]}


def generates(folder: Path) -> list[int]:
    """Four tokens of a result, with cache, in a process of its own."""
    script = (
        "import sys, torch; from llmpruner import load_pruned; m = load_pruned(sys.argv[1]); "
        "ids = m.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, do_sample=False); print(ids[0, 3:].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], check=True, capture_output=True, text=True)
    found: list[int] = json.loads(done.stdout)
    return found


def command(checkout: Path, *arguments: str) -> dict[str, Any]:
    """``llmpruner ARGUMENTS`` with the code of ``checkout``."""
    return {"command": "llmpruner " + " ".join(arguments), **run(["-m", "llmpruner", *arguments], checkout)}


def run(arguments: list[str], checkout: Path) -> dict[str, Any]:
    """A Python process: seconds, CPU seconds, and GiB of peak resident memory."""
    with tempfile.TemporaryDirectory() as folder:
        for name, place in {**PACKAGES, "benchmarks": "benchmarks"}.items():
            source = ROOT if name == "benchmarks" else checkout
            (Path(folder) / name).symlink_to(source / place, target_is_directory=True)
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": folder},
            cwd=folder,  # `python -m` looks there first
        )
        assert process.stderr is not None
        error = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed with status {status}: {error[-2000:]}")
    return {
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
    }


if __name__ == "__main__":
    main()
