"""Does everything that runs on a CPU run on a GPU, and how fast? On random weights, so that nothing is fetched.

    python -m benchmarks.gpu_check [--device cuda]

Every method prunes the same model on the CPU and on the device; the device's model must give the CPU's logits for the
CPU's plan. Writes ``results/gpu_check.json``.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmpruner import CalibrationSource, Catalog, Model, PruneSettings, build_graph, plugin_manager
from llmpruner.calibration.calibration import CalibrationText, Part
from llmpruner.recipes.calibrating import calibrate
from llmpruner.recipes.jobs import PruneJob, prune_job
from llmpruner.recipes.pipeline import Draft, apply_draft, make_plan
from llmpruner.settings import settings_from

from .measure import as_json, machine

RESULTS = Path(__file__).parent / "results" / "gpu_check.json"
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
SAMPLES, LENGTH = 32, 128
CATALOG = Catalog(plugin_manager(entry_points=False))
TOLERANCE = 2e-2
"""Largest relative difference of logits: least squares amplifies what two devices round differently."""


class Given(CalibrationSource):
    """Tokens that were made before: what a model writes differs between devices."""

    name = "given"
    tokens: torch.Tensor

    def sample(self, task: Any) -> torch.Tensor:
        return self.tokens[: task.samples, : task.length]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=4, vocab_size=8192, max_position_embeddings=512)
    model = LlamaForCausalLM(config).eval()
    family = Catalog(plugin_manager()).family_for(config)
    loaded = Model("random", config, family, build_graph(family, config), model=model, tokenizer=None)
    rows = [check(method, loaded, device) for method in CATALOG.methods]
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    results = {"machine": machine(), "device": name, "parameters": model.num_parameters(), "methods": rows}
    RESULTS.write_text(as_json(results), encoding="utf-8")
    print(as_json(results))
    wrong = [row["method"] for row in rows if not row["difference"] < TOLERANCE]
    if wrong:
        raise SystemExit(f"differs from the CPU: {', '.join(wrong)}")


def check(method: str, dense: Model, device: str) -> dict[str, Any]:
    job = job_of(method, dense)
    ids = torch.randint(0, dense.config.vocab_size, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {"method": method}
    logits, first = {}, None
    for where in ("cpu", device):
        loaded = replace(dense, model=copy.deepcopy(dense.model).to(where))
        started = time.monotonic()
        plan, _ = make_plan(loaded, job)
        first = first or plan
        found[f"seconds on {where}"] = round(time.monotonic() - started, 2)
        found[f"same plan on {where}"] = plan.cuts == first.cuts
        pruned = apply_draft(loaded, Draft(first, calibrate(loaded, job)), CATALOG)
        found[f"seconds with the cut on {where}"] = round(time.monotonic() - started, 2)
        with torch.no_grad():
            logits[where] = pruned.model(ids.to(where)).logits.float().cpu()
    reference = logits["cpu"]
    found["difference"] = float((logits[device] - reference).norm() / reference.norm())
    return found


def job_of(method: str, dense: Model) -> PruneJob:
    """``--method METHOD --ratio 0.2`` on few samples, with text that the model wrote on the CPU."""
    settings = {"ratio": 0.2, "method": method, "samples": SAMPLES, "length": LENGTH}
    job = prune_job(settings_from(PruneSettings, settings), CATALOG)
    assert job.calibration is not None
    written = calibrate(dense, job)
    source = Given()
    source.tokens = written.input_ids
    text = CalibrationText("given", (Part(source, ""),))
    return replace(job, calibration=replace(job.calibration, text=text))


if __name__ == "__main__":
    main()
