"""Trainings that are killed at random moments and run again, until they end: the result must have the same bytes.

    LLMPRUNER_DATA=… python -m benchmarks.recovery_kills [NAME …]

``NAME``: of `WAYS`; the others keep their results. The demo model, pruned by a fifth, is trained for `STEPS` steps;
each training is killed (SIGKILL) `KILLS` times. Writes ``benchmarks/results/recovery_kills.json``.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llmpruner.models.record import OF_THIS_MACHINE

from .measure import as_json, data_folder, machine, run

RESULTS = Path(__file__).parent / "results" / "recovery_kills.json"
STEPS, KILLS = 30, 5
_TRAINING = ("--max-steps", str(STEPS), "--batch-size", "4", "--cutoff", "128", "--learning-rate", "2e-4", "--autocast")
WAYS: dict[str, tuple[str, ...]] = {
    "distil": ("--strategy", "distil", *_TRAINING),
    "lora": ("--strategy", "lora", *_TRAINING),
}


def main() -> None:
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    data = data_folder() / "alpaca_en_1k.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run("prune", "demo", "--ratio", "0.2", "--samples", "64", "-o", str(work / "pruned"))
        for name in sys.argv[1:] or WAYS:
            random.seed(0)
            found[name] = {"machine": machine(), **killed(work, ("--data", str(data), *WAYS[name]))}
            text = as_json(found).replace(str(work), "$WORK").replace(str(data.parent), "$LLMPRUNER_DATA")
            RESULTS.write_text(text)


def killed(work: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """Train undisturbed, then with kills."""
    whole, out = work / "whole", work / "out"
    seconds = -time.monotonic()
    subprocess.run(command(work, whole, options), check=True, capture_output=True)
    seconds += time.monotonic()
    kills = []
    while len(kills) < KILLS:
        moment = random.uniform(0.1, 0.6) * seconds
        process = subprocess.Popen(command(work, out, options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills.append({"after seconds": round(moment, 1), "saved step": saved_step(work / "out.recovery")})
            if not out.exists():
                continue
        else:
            assert process.returncode == 0, "a continued training failed"
        # It ended, or was killed after its result was written: from the start again.
        assert checksums(out) == checksums(whole), "a training that ended in time has other bytes"
        shutil.rmtree(out)
    ended = subprocess.run(command(work, out, options), check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    losses, wanted = (
        json.loads((one / "llmpruner.json").read_text())["recovery"][-1]["losses"] for one in (out, whole)
    )
    same = checksums(out) == checksums(whole)
    left = sorted(path.name for path in work.iterdir() if path.name not in ("pruned", "whole", "out"))
    shutil.rmtree(whole)
    shutil.rmtree(out)
    return {
        "command": "llmpruner " + " ".join(command(work, out, options)[3:]), "seconds undisturbed": round(seconds, 1),
        "kills": kills, "steps": len(losses), "last losses": [losses[-1], wanted[-1]],
        "largest difference of losses": max(abs(a - b) for a, b in zip(losses, wanted, strict=True)),
        "same bytes": same, "left behind": left,
    }  # fmt: skip


def saved_step(state: Path) -> int:
    """Of the newest checkpoint; 0 without one."""
    return max((int(path.name.partition("-")[2]) for path in state.glob("checkpoint-*")), default=0)


def command(work: Path, out: Path, options: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "llmpruner", "recover", str(work / "pruned"), "-o", str(out), *options]


def checksums(folder: Path) -> str:
    """One digest of all files, except of those that tell of the time that it took."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.name not in OF_THIS_MACHINE):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
