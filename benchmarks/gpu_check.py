"""Does everything that runs on a CPU run on a GPU, and how fast? On random weights, so that nothing is fetched.

    python -m benchmarks.gpu_check [--device cuda]

Every method prunes the same model on the CPU and on the device; the device's model must give the CPU's logits for the
CPU's plan. Writes ``results/gpu_check.json``.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmpruner.families.graph import build_graph
from llmpruner.loading.model import Model
from llmpruner.plugins.builtin import llmpruner_methods
from llmpruner.plugins.catalog import Catalog
from llmpruner.plugins.host import plugin_manager
from llmpruner.recipes.pipeline import PruneSettings, apply_plan, make_plan
from llmpruner.settings import PruneSettings as Asked
from llmpruner.structure.plan import Target

from .measure import as_json, machine

RESULTS = Path(__file__).parent / "results" / "gpu_check.json"
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
SAMPLES, LENGTH = 32, 128
METHODS = {cls.name: cls for cls in llmpruner_methods()}
TOLERANCE = 2e-2
"""Largest relative difference of logits: least squares amplifies what two devices round differently."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=4, vocab_size=8192, max_position_embeddings=512)
    model = LlamaForCausalLM(config).eval()
    rows = [check(method, model, device) for method in METHODS]
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    results = {"machine": machine(), "device": name, "parameters": model.num_parameters(), "methods": rows}
    RESULTS.write_text(as_json(results), encoding="utf-8")
    print(as_json(results))
    wrong = [row["method"] for row in rows if not row["difference"] < TOLERANCE]
    if wrong:
        raise SystemExit(f"differs from the CPU: {', '.join(wrong)}")


def check(method: str, model: LlamaForCausalLM, device: str) -> dict[str, Any]:
    preset, catalog = METHODS[method]().defaults(Asked(ratio=0.2), writes=True), Catalog(plugin_manager())
    settings = PruneSettings(
        target=Target(by="ratio", amount=0.2), compensate=preset["compensate"], samples=SAMPLES, length=LENGTH
    )
    criterion = catalog.criteria[preset["importance"]]()
    family = catalog.families["llama"]()
    graph = build_graph(family, model.config)
    ids = torch.randint(0, model.config.vocab_size, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {"method": method}
    logits, plan, calibration = {}, None, None
    for where in ("cpu", device):
        loaded = Model("random", model.config, family, graph, model=copy.deepcopy(model).to(where), tokenizer=None)
        if calibration is None:
            from llmpruner.data.calibration import CalibrationSet
            from llmpruner.data.written import self_generated

            calibration = CalibrationSet(self_generated(loaded.model, None, SAMPLES, LENGTH, 0), "self")
        started = time.monotonic()
        made = make_plan(loaded, criterion, settings, calibration=calibration)
        plan = plan or made
        found[f"seconds on {where}"] = round(time.monotonic() - started, 2)
        found[f"same plan on {where}"] = made.cuts == plan.cuts
        pruned = apply_plan(loaded, plan, calibration=calibration)
        found[f"seconds with the cut on {where}"] = round(time.monotonic() - started, 2)
        with torch.no_grad():
            logits[where] = pruned.model(ids.to(where)).logits.float().cpu()
    reference = logits["cpu"]
    found["difference"] = float((logits[device] - reference).norm() / reference.norm())
    return found


if __name__ == "__main__":
    main()
