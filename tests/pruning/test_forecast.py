"""What the forecast says of memory and disk is at least nine tenths of what a run adds, and at most 1.6 times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "vocab_size": 2048}
SETTINGS = {"ratio": 0.2, "importance": "taylor", "samples": 16, "length": 16, "calibration": "self"}
TRIALS = {**SETTINGS, "importance": "l2", "allocation": "sensitivity"}
PROBE = """
import json, re, sys
from pathlib import Path
import psutil
from llmpruner import api
from llmpruner.progress import Progress
from llmpruner.pruning import forecast

forecast.free_memory = lambda: int(sys.argv[3])
# Linux counts what a parent holds into the peak of its child.
Path("/proc/self/clear_refs").write_text("5")
before = psutil.Process().memory_info().rss
pruned = api.prune(sys.argv[1], output=sys.argv[2], progress=Progress(), **json.loads(sys.argv[4]))
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"before": before, "peak": peak, **pruned.outcome.forecast}))
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """71 M parameters in float32, 285 MB, so that weights are most of what a run adds."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=4))
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("settings", "streamed"),
    [(SETTINGS, True), *(pytest.param(each, False, marks=pytest.mark.long) for each in (SETTINGS, TRIALS))],
)
def test_it_is_not_far_below_or_above_what_a_run_takes(dense, tmp_path, settings, streamed):
    free = 0 if streamed else 1 << 50
    arguments = [dense, tmp_path / "out", free, json.dumps(settings)]
    run = subprocess.run([sys.executable, "-c", PROBE, *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["streamed"] == streamed
    expected, taken = found["memory"] - found["before"], found["peak"] - found["before"]
    assert 0.9 * taken <= expected <= 1.6 * taken, found
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 0.9 * written <= found["disk"] <= 1.6 * written
