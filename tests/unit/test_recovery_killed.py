"""A training that is killed (SIGKILL) continues, with the same losses and the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_models
import torch

import llmpruner
from llmpruner.progress import Progress
from llmpruner.recovery.training import latest_checkpoint

OPTIONS = {
    "batch_size": 4, "micro_batch_size": 2, "max_steps": 40, "learning_rate": 5e-3, "validation": 4, "eval_steps": 4,
    "schedule": "cosine",
}  # fmt: skip


def prepared(place: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A model in ``place``, beside its data."""
    folder = place / "model"
    tiny_models.llama().to(dtype).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    rows = [{"prompt": f"Question {n}: what is it?\n", "completion": f"It is {n * n} or so."} for n in range(24)]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def result(folder: Path) -> tuple[list[float], dict[str, str]]:
    losses = json.loads((folder / "llmpruner.json").read_text())["recovery"][-1]["losses"]
    # The times of a run are its own.
    files = [file for file in sorted(folder.iterdir()) if file.name != "run.json"]
    return losses, {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "dtype"), [("lora", torch.float32), ("full", torch.bfloat16)])
def test_a_killed_training_ends_with_the_same_bytes(tmp_path, strategy, dtype):
    model, data = prepared(tmp_path, dtype), str(tmp_path / "data.jsonl")
    chosen = {**OPTIONS, "strategy": strategy}
    whole, out, state = tmp_path / "whole", tmp_path / "out", tmp_path / "out.recovery"
    llmpruner.recover(model, data=data, output=whole, **chosen)
    options = [text for name, value in chosen.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "llmpruner", "recover", str(model), "--data", data, "-o", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while latest_checkpoint(state) is None:
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.005)
    time.sleep(random.Random(1).uniform(0, 0.2))
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert state.exists() and not out.exists()
    steps: list[int] = []

    class Counted(Progress):
        @contextmanager
        def counter(self, label):
            yield lambda step, *_: steps.append(step)

    llmpruner.recover(model, data=data, output=out, progress=Counted(), **chosen)
    assert 1 < steps[0] <= 40 and steps[-1] == 40
    (losses, files), (wanted, others) = result(out), result(whole)
    assert losses == pytest.approx(wanted, abs=1e-6) and len(losses) == 40
    assert files == others and not state.exists()
