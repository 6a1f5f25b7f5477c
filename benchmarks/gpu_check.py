"""Does everything that runs on a CPU run on a GPU, and how fast? On random weights, so that nothing is fetched.

    python -m benchmarks.gpu_check [--device auto]

Every method plans on both devices, and the plan of the CPU is replayed on both. The same plan with weights that are
read layer by layer gives the same weights, in less memory of the device than was forecast. Trainings and evaluations
give the same losses. Prints the results as JSON; `RESULTS` is where those of a GPU are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import llmpruner
from llmpruner import LoadSettings, RunSettings
from llmpruner.models.devices import device_of, named
from llmpruner.models.opening import load_pruned

from .measure import as_json, machine
from .shapes import write_model

RESULTS = Path(__file__).parent / "results" / "gpu_check.json"
METHODS = ("best", "fast", "llm-pruner")
STRATEGIES = ("distil", "full", "lora")
TEXT = {"samples": 32, "length": 128}
TOLERANCE = 2e-2
"""Largest relative difference of logits, losses and perplexities: least squares amplifies what two devices round
differently."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    device = str(device_of(parser.parse_args().device))
    with tempfile.TemporaryDirectory() as folder:
        model, text = Path(folder) / "model", Path(folder) / "text.txt"
        write_model("tiny", model, torch.float32)
        # What a model writes differs between devices, so that the text comes from a file.
        source = Path(__file__).read_text(encoding="utf-8")
        text.write_text(source * 20, encoding="utf-8")
        data = Path(folder) / "rows.jsonl"
        data.write_text(
            "".join(json.dumps({"text": line}) + "\n" for line in source.splitlines() if line.strip()), encoding="utf-8"
        )
        rows = {method: of_method(model, text, method, device) for method in METHODS}
        rows["layer by layer"] = streamed(model, text, device)
        pruned = Path(folder) / "pruned"
        llmpruner.prune(
            model, ratio=0.2, method="fast", calibration=text, output=pruned, load=LoadSettings(device="cpu")
        )
        rows |= {strategy: of_strategy(pruned, data, strategy, device) for strategy in STRATEGIES}
        rows["evaluate"] = evaluated(model, pruned, device)
        speed = llmpruner.bench([model, pruned], prompt=128, new=16, load=LoadSettings(device=device))
    where = {"machine": machine(), "device": named(torch.device(device))}
    found = {**where, "checks": rows, "speed": asdict(speed)["cases"]}
    print(as_json(found))
    if device != "cpu":
        RESULTS.write_text(as_json(found))
    wrong = [name for name, row in rows.items() if not row["difference"] < TOLERANCE]
    if wrong:
        raise SystemExit(f"differs from the CPU: {', '.join(wrong)}")


def of_method(model: Path, text: Path, method: str, device: str) -> dict[str, Any]:
    ids = torch.randint(0, 256, (4, 128), generator=torch.Generator().manual_seed(1))
    row: dict[str, Any] = {}
    plans, logits = [], []
    for where in ("cpu", device):
        load = LoadSettings(device=where)
        started = time.monotonic()
        plans.append(llmpruner.plan(model, load=load, calibration=text, method=method, ratio=0.2, **TEXT))
        row[f"seconds of the plan on {where}"] = round(time.monotonic() - started, 2)
        pruned = llmpruner.prune(model, plan=plans[0], load=load)
        row[f"seconds in all on {where}"] = round(time.monotonic() - started, 2)
        with torch.no_grad():
            logits.append(pruned.network(ids.to(where)).logits.float().cpu())
    row["same units"] = plans[0].cuts == plans[1].cuts
    row["difference"] = float((logits[1] - logits[0]).norm() / logits[0].norm())
    return row


def streamed(model: Path, text: Path, device: str) -> dict[str, Any]:
    """``difference``: the largest of a weight, against the model in memory on the same device."""
    weights: list[Mapping[str, torch.Tensor]] = []
    row: dict[str, Any] = {}
    module: Any = torch.get_device_module(device)
    limit = None
    for way in ("in memory", "layer by layer"):
        with tempfile.TemporaryDirectory() as folder:
            output, run = Path(folder) / "pruned", RunSettings(max_memory=limit)
            getattr(module, "reset_peak_memory_stats", int)()  # mps counts none
            pruned = llmpruner.prune(
                model, ratio=0.2, method="best", calibration=text, output=output, run=run,
                load=LoadSettings(device=device), **TEXT,
            )  # fmt: skip
            assert pruned.outcome and pruned.outcome.forecast
            forecast = pruned.outcome.forecast
            row[way] = {"forecast": forecast, "peak": getattr(module, "max_memory_allocated", int)()}
            weights.append(load_pruned(output).state_dict())
        limit = (forecast["device_memory"] or forecast["memory"]) * 9 // 10
    row["difference"] = max(float((weights[1][name] - w).abs().max()) for name, w in weights[0].items())
    return row


def of_strategy(pruned: Path, data: Path, strategy: str, device: str) -> dict[str, Any]:
    losses, seconds = [], []
    for where in ("cpu", device):
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            model = llmpruner.recover(
                pruned, data=data, strategy=strategy, epochs=3, batch_size=8, cutoff=128, validation=8,
                work_dir=folder, load=LoadSettings(device=where),
            )  # fmt: skip
            seconds.append(round(time.monotonic() - started, 2))
            assert model.record is not None
            losses.append([each["loss"] for each in model.record["recovery"][-1]["validation"]])
    difference = max(abs(ours / theirs - 1) for ours, theirs in zip(*losses, strict=True))
    return {"seconds": seconds, "held-out losses": losses, "difference": difference}


def evaluated(model: Path, pruned: Path, device: str) -> dict[str, Any]:
    results = []
    for where in ("cpu", device):
        load = LoadSettings(device=where)
        first, second = llmpruner.evaluate([model, pruned], perplexity=__file__, kl=True, load=load)
        assert first.perplexity and second.perplexity
        results.append([first.perplexity, second.perplexity])
        llmpruner.generate(pruned, "import torch", max_new_tokens=16, load=load)
    difference = max(abs(math.log(ours / theirs)) for ours, theirs in zip(*results, strict=True))
    return {"perplexities": results, "difference": difference}


if __name__ == "__main__":
    main()
