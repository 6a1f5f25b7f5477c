"""Training in two processes over gloo: the losses and weights of one process with twice the accumulation, up to
rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import many_trainers
import pytest
import torch
from test_recovery_killed import prepared

from llmpruner.errors import SettingsError
from llmpruner.recovery.processes import check_processes
from llmpruner.recovery.schedule import micro_batch
from llmpruner.settings import LoadSettings, RecoverSettings

pytest.importorskip("peft")
HERE = Path(__file__).parent
PATHS = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
SETTINGS = RecoverSettings(data="a.jsonl")


def start(processes: int, *arguments: object) -> subprocess.Popen[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, arguments)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300", "PYTHONPATH": PATHS},
    )  # fmt: skip


@pytest.mark.long
def test_two_processes_train_as_one(tmp_path):
    """With copies of the model, and with FSDP; also when interrupted. And on the command line."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    model = prepared(tmp_path)
    command = (
        *("recover", model, "--data", tmp_path / "data.jsonl", "-o", tmp_path / "out", "--strategy", "full"),
        *("--max-steps", 2, "--batch-size", 4, "--validation", 4),
    )
    several = start(2, HERE / "many_trainers.py", two, *command)
    many_trainers.run(one)
    output, _ = several.communicate(timeout=200)
    assert several.returncode == 0, output
    check_command(tmp_path, output)
    cases = (*many_trainers.STRATEGIES, "bfloat16", "continued")
    for case in (*cases, "fsdp full", "fsdp lora", "fsdp bfloat16", "fsdp continued"):
        # Products are rounded to bfloat16, and at the end the weights.
        narrow = case.endswith("bfloat16")
        wanted = torch.load(one / f"{case.removeprefix('fsdp ')}-0.pt")
        for rank in range(2):
            found = torch.load(two / f"{case}-{rank}.pt")
            for key in ("losses", "validation"):
                assert found[key] == pytest.approx(wanted[key], abs=1e-2 if narrow else 2e-5), (case, key)
            for name, value in wanted["weights"].items():
                assert found["weights"][name].dtype == value.dtype == (torch.bfloat16 if narrow else torch.float32)
                # Adam divides by the size of a gradient, so that rounding of small ones shows in full.
                limit = 3e-2 if narrow else 1e-3
                torch.testing.assert_close(found["weights"][name], value, atol=limit, rtol=0, msg=f"{case}: {name}")
    for way in ("", "fsdp "):
        whole, continued = (torch.load(two / f"{way}{case}-0.pt")["losses"] for case in ("full", "continued"))
        assert continued == pytest.approx(whole, abs=1e-6)
    wanted = torch.load(one / "sharded-0.pt")
    for rank in range(2):
        found = torch.load(two / f"sharded-{rank}.pt")
        assert (found["class"], found["tied"], found["plain"]) == ("LlamaForCausalLM", True, True)
        torch.testing.assert_close(found["logits"], wanted["logits"], atol=1e-3, rtol=0)
        for key in ("weights", "best"):
            for name, value in wanted[key].items():
                torch.testing.assert_close(found[key][name], value, atol=1e-3, rtol=0)
        assert not torch.equal(found["weights"]["lm_head.weight"], found["best"]["lm_head.weight"])


def check_command(folder: Path, output: str) -> None:
    """One process shows and writes the result of the command."""
    assert output.count("✓") == 1 and output.count("step 2: validation loss") == 1
    (record,) = json.loads((folder / "out" / "llmpruner.json").read_text())["recovery"]
    assert len(record["losses"]) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["data.jsonl", "model", "one", "out", "two"]


def test_what_processes_cannot_share_is_refused(monkeypatch):
    assert micro_batch(SETTINGS, 2) == 4
    assert micro_batch(SETTINGS.model_copy(update={"batch_size": 4}), 2) == 2
    with pytest.raises(SettingsError, match="--batch-size 64 cannot be shared by 3 processes; give a multiple of 3"):
        micro_batch(SETTINGS, 3)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SettingsError, match="FSDP needs GPUs, as accelerate uses it with them alone"):
        check_processes(SETTINGS, LoadSettings())
    with pytest.raises(SettingsError, match="--minutes cannot be used with FSDP"):
        check_processes(SETTINGS.model_copy(update={"minutes": 3.0}), LoadSettings(device="cuda"))
    check_processes(SETTINGS, LoadSettings(device="cuda"))
