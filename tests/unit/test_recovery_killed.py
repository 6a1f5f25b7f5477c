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
from pathlib import Path

import pytest
import tiny_models

from llmpruner.recovery.training import latest_checkpoint

OPTIONS = (
    *("--batch-size", "4", "--micro-batch-size", "2", "--max-steps", "40", "--learning-rate", "5e-3"),
    *("--validation", "4", "--eval-steps", "4", "--schedule", "cosine"),
)


def prepared(place: Path) -> Path:
    """A model in ``place``, beside its data."""
    folder = place / "model"
    tiny_models.llama().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    rows = [{"prompt": f"Question {n}: what is it?\n", "completion": f"It is {n * n} or so."} for n in range(24)]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(model: Path, out: Path) -> list[str]:
    data = str(model.parent / "data.jsonl")
    return [sys.executable, "-m", "llmpruner", "recover", str(model), "--data", data, "-o", str(out), *OPTIONS]


def result(folder: Path) -> tuple[list[float], dict[str, str]]:
    losses = json.loads((folder / "llmpruner.json").read_text())["recovery"][-1]["losses"]
    return losses, {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


@pytest.mark.slow
def test_a_killed_training_ends_with_the_same_bytes(tmp_path):
    model = prepared(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, out, state = tmp_path / "whole", tmp_path / "out", tmp_path / "out.recovery"
    subprocess.run(command(model, whole), env=environment, check=True, capture_output=True)
    drawn = random.Random(1)
    for number in range(2):
        run = subprocess.Popen(command(model, out), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        before = latest_checkpoint(state)
        while latest_checkpoint(state) == before:
            assert run.poll() is None, run.communicate()[1]
            time.sleep(0.005)
        time.sleep(drawn.uniform(0, 0.3))
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert not out.exists(), f"run {number} ended before it was killed"
    subprocess.run(command(model, out), env=environment, check=True, capture_output=True)
    (losses, files), (wanted, others) = result(out), result(whole)
    assert losses == pytest.approx(wanted, abs=1e-6) and len(losses) == 40
    assert files == others and not state.exists()
