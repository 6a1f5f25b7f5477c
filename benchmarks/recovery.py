"""Recovery strategies in the same time, on the demo model pruned without a corpus, judged on texts of which no stage
saw any.

    LLMPRUNER_DATA=… python -m benchmarks.recovery [--minutes 15] [NAME …]

``NAME``: of `WAYS`; the others keep their results. The number of steps of each is what fits into the time
(``--minutes``); all examples are trained on (``--validation 0``). Writes ``results/recovery.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .measure import as_json, data_folder, machine, measured, run
from .quality import _instructions

RESULTS = Path(__file__).parent / "results" / "recovery.json"
BY_LAYER = {"local": 30}
"""The layers of the demo model, for ways that train them one by one: steps are counted over all of them, and fit into
the time by the seconds of the first of each layer."""
PROBE = 4
"""These steps."""
_PACKED = ("--pack", "--learning-rate", "2e-4")
_MIXED = ("--data", "{c4},{alpaca}", *_PACKED)
WAYS: dict[str, tuple[str, ...]] = {
    "distil": ("--strategy", "distil", *_MIXED, "--autocast"),
    "full": ("--strategy", "full", *_MIXED, "--autocast"),
    "local": ("--strategy", "local", *_MIXED, "--autocast", "--cutoff", "512", "--batch-size", "8"),
    "distil, self-written": ("--strategy", "distil", "--data", "self:2000", *_PACKED, "--autocast"),
    "lora, self-written": ("--strategy", "lora", "--data", "self:2000", "--autocast"),
    "lora, the paper's": ("--strategy", "lora", "--data", "{alpaca}", "--autocast", "--batch-size", "64"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("names", nargs="*", default=list(WAYS))
    arguments = parser.parse_args()
    data = data_folder()
    done: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pruned = Path(os.environ.get("LLMPRUNER_PRUNED", work / "pruned"))
        if not pruned.is_dir():
            found = run("prune", "demo", "--ratio", "0.2", "-o", str(pruned))
            keys = ("command", "seconds", "peak_mib")
            done["pruned"] = {**{key: found[key] for key in keys}, **judged(str(pruned), data, work)}
            done["dense"] = judged("demo", data, work)
            write(done, work, data)
        for name in arguments.names:
            done[name] = {
                "machine": machine(), "minutes": arguments.minutes,
                **recovered(name, pruned, arguments.minutes, data, work),
            }  # fmt: skip
            write(done, work, data)


def recovered(name: str, pruned: Path, minutes: float, data: Path, work: Path) -> dict[str, Any]:
    names = {"c4": data / "c4_sample_300.jsonl", "alpaca": data / "alpaca_en_1k.jsonl"}
    options = tuple(option.format(**names) for option in WAYS[name])
    if name in BY_LAYER:
        options = (*options, "--max-steps", str(steps_of_layers(BY_LAYER[name], options, pruned, minutes, work)))
    else:
        options = (*options, "--minutes", str(minutes), "--validation", "0")
    out = work / "recovered"
    found = run("recover", str(pruned), *options, "-o", str(out), timeout=36000)
    losses = json.loads((out / "llmpruner.json").read_text())["recovery"][-1]["losses"]
    judgement = judged(str(out), data, work)
    shutil.rmtree(out)
    return {
        **{key: found[key] for key in ("command", "seconds", "cpu_seconds", "peak_mib")},
        "steps": len(losses), "first and last loss": [losses[0], losses[-1]], **judgement,
    }  # fmt: skip


def steps_of_layers(layers: int, options: tuple[str, ...], pruned: Path, minutes: float, work: Path) -> int:
    """The steps over all layers that fit into the time."""
    probes = layers, layers * (1 + PROBE)
    # What is before the first step is in both.
    short, long = (
        run("recover", str(pruned), *options, "--max-steps", str(steps), "-o", str(work / f"probe-{steps}"))["seconds"]
        for steps in probes
    )
    for steps in probes:
        shutil.rmtree(work / f"probe-{steps}")
    return layers * max(1, int((60 * minutes - short) / ((long - short) / PROBE)))


def judged(model: str, data: Path, work: Path) -> dict[str, float]:
    text = work / "instructions.txt"
    text.write_text(_instructions(data), encoding="utf-8")
    first = measured(model, data / "wikitext2_unk_test.txt", work)
    second = measured(model, text, work, kl=False)
    return {"wikitext2": first["perplexity"], "kl": first["kl_per_token"], "instructions": second["perplexity"]}


def write(done: dict[str, Any], work: Path, data: Path) -> None:
    text = as_json(done).replace(str(work), "$WORK").replace(str(data), "$LLMPRUNER_DATA")
    given = os.environ.get("LLMPRUNER_PRUNED")
    RESULTS.write_text(text.replace(given, "$WORK/pruned") if given else text)


if __name__ == "__main__":
    main()
