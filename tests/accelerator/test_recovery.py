"""On a device, every strategy of recovery gives the CPU's losses and weights, bit for bit."""

import json
from pathlib import Path

import pytest
from device_cases import begin, dense, differences, like_the_cpu, prune

from llmpruner import api
from llmpruner.settings import LoadSettings

STRATEGIES = {
    "distil": {"strategy": "distil"},
    "distil on the dense model's text": {"strategy": "distil", "data": "self:8"},
    "full": {"strategy": "full"},
    "lora": {"strategy": "lora"},
}
SETTINGS = {"max_steps": 4, "batch_size": 4, "learning_rate": 5e-3, "cutoff": 24, "validation": 4}


@pytest.mark.slow
def test_every_strategy(on_device):
    assert on_device(different) == {}


def different():
    prune(dense("llama"), "pruned", "cpu", importance="l2", compensate="none", ratio=0.2)
    rows = [{"prompt": f"Question {n}:\n", "completion": "It is so. " * (n % 4 + 1)} for n in range(24)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for name, settings in STRATEGIES.items():
        records = []
        for device in ("cpu", "standin:1"):
            begin(float64=False)
            with like_the_cpu():
                options = {"data": "rows.jsonl", **SETTINGS, **settings}
                api.recover("pruned", output=f"{name}-{device}", load=LoadSettings(device=device), **options)
            record = json.loads(Path(f"{name}-{device}", "llmpruner.json").read_text())["recovery"][-1]
            records.append((record["losses"], record["validation"]))
        same = records[0] == records[1] and records[0][0][0] != records[0][0][-1]
        found[name] = differences(f"{name}-standin:1", f"{name}-cpu") or ("" if same else f"other losses: {records}")
    return {name: why for name, why in found.items() if why}
