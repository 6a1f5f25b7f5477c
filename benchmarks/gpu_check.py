"""Does everything that runs on a CPU run on a GPU, and how fast? On random weights, so that nothing is fetched.

    python -m benchmarks.gpu_check [--device cuda]

Every method plans on both devices; the plan of the CPU is then replayed on both, and the results must give the same
logits. Prints the results as JSON.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import llmpruner
from llmpruner import LoadSettings

from .measure import as_json, machine
from .shapes import write_model

METHODS = ("best", "fast", "llm-pruner")
TOLERANCE = 2e-2
"""Largest relative difference of logits: least squares amplifies what two devices round differently."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    with tempfile.TemporaryDirectory() as folder:
        model, text = Path(folder) / "model", Path(folder) / "text.txt"
        write_model("tiny", model, torch.float32)
        # What a model writes differs between devices, so that the text comes from a file.
        text.write_text(Path(__file__).read_text(encoding="utf-8") * 20, encoding="utf-8")
        rows = {method: check(model, text, method, device) for method in METHODS}
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    print(as_json({"machine": machine(), "device": name, "methods": rows}))
    wrong = [method for method, row in rows.items() if not row["difference"] < TOLERANCE]
    if wrong:
        raise SystemExit(f"differs from the CPU: {', '.join(wrong)}")


def check(model: Path, text: Path, method: str, device: str) -> dict[str, Any]:
    ids = torch.randint(0, 256, (4, 128), generator=torch.Generator().manual_seed(1))
    row: dict[str, Any] = {}
    plans, logits = [], []
    for where in ("cpu", device):
        load = LoadSettings(device=where)
        started = time.monotonic()
        settings: dict[str, Any] = {"method": method, "ratio": 0.2, "samples": 32, "length": 128}
        plans.append(llmpruner.plan(model, load=load, calibration=str(text), **settings))
        row[f"seconds of the plan on {where}"] = round(time.monotonic() - started, 2)
        pruned = llmpruner.prune(model, plan=plans[0], load=load)
        row[f"seconds in all on {where}"] = round(time.monotonic() - started, 2)
        with torch.no_grad():
            logits.append(pruned.network(ids.to(where)).logits.float().cpu())
    row["same units"] = plans[0].cuts == plans[1].cuts
    row["difference"] = float((logits[1] - logits[0]).norm() / logits[0].norm())
    return row


if __name__ == "__main__":
    main()
