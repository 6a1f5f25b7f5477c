"""Prunes that are killed at random moments and run again, until they end: the result must have the same bytes.

    python -m benchmarks.kills [NAME …]

``NAME``: ``best, in memory``, ``best, layer by layer``, ``llm-pruner, in memory`` or ``llm-pruner, layer by layer``;
the others keep their results. A random model of the shape ``small`` (`benchmarks.shapes`), in memory and layer by
layer: ``--method best`` is killed (SIGKILL) ten times, ``--method llm-pruner`` five times, and once each stopped by
SIGINT and by a full disk (a limit on the size of files). Writes ``benchmarks/results/kills.json``.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .measure import as_json, machine
from .shapes import config_of, write_random

RESULTS = Path(__file__).parent / "results" / "kills.json"
METHODS = {
    "best": ("--method", "best", "--samples", "24", "--length", "256"),
    "llm-pruner": ("--method", "llm-pruner", "--samples", "48", "--length", "256"),
}
WAYS = ("in memory", "layer by layer")
KILLS = {"best": 10, "llm-pruner": 5}


def main() -> None:
    chosen = sys.argv[1:] or [f"{method}, {way}" for method in METHODS for way in WAYS]
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "small"
        write_random(config_of("small"), model)
        for name in chosen:
            method, way = name.split(", ")
            options = METHODS[method]
            if way == "layer by layer":
                options = (*options, "--max-memory", limit(model, options))
            random.seed(0)
            found[name] = {"machine": machine(), **killed(model, Path(work), method, options)}
            RESULTS.write_text(as_json(found).replace(work, "$WORK"))


def limit(model: Path, options: tuple[str, ...]) -> str:
    """A little more than the least memory that a prune can do with, which is layer by layer."""
    refused = subprocess.run(
        [*command(model, model.parent / "none", options), "--max-memory", "1MiB"], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    least = re.search(r"needs at least ([\d.]+) ([MG]iB)", refused.stderr.replace("\n", " "))
    assert least is not None, refused.stderr
    return f"{float(least[1]) * 1.05:.2f}{least[2]}"


def killed(model: Path, work: Path, method: str, options: tuple[str, ...]) -> dict[str, Any]:
    """Run a command undisturbed, then with kills."""
    whole, out = work / "whole", work / "out"
    seconds = -time.monotonic()
    subprocess.run(command(model, whole, options), check=True, capture_output=True)
    seconds += time.monotonic()
    wanted = checksums(whole)
    at: list[float] = []
    how: list[dict[str, Any]] = []
    ends = [signal.SIGKILL] * KILLS[method] + [signal.SIGINT]
    while len(at) < len(ends):
        end, moment = ends[len(at)], random.uniform(0.1, 0.95) * seconds
        process = subprocess.Popen(command(model, out, options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(end)
            _, error = process.communicate()
            at.append(round(moment, 1))
            how.append({"signal": end.name, "traceback": b"Traceback" in error})
        if out.exists():
            # It went on from the last kill, and ended in time.
            assert checksums(out) == wanted, "a run that was killed before has other bytes"
            shutil.rmtree(out)
    limited = subprocess.run(
        command(model, out, options), capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )  # fmt: skip
    full = {"exit": limited.returncode, "line": limited.stderr.strip().splitlines()[-1], "output": out.exists()}
    subprocess.run(command(model, out, options), check=True, capture_output=True)
    same = checksums(out) == wanted
    left = sorted(path.name for path in work.iterdir() if path.name not in ("small", "whole", "out"))
    shutil.rmtree(whole)
    shutil.rmtree(out)
    return {
        "command": " ".join(command(model, out, options)[2:]), "seconds undisturbed": round(seconds, 1),
        "ended after seconds": at, "how": how, "no room for files": full, "same bytes": same, "left behind": left,
    }  # fmt: skip


def command(model: Path, out: Path, options: tuple[str, ...]) -> list[str]:
    return [
        *(sys.executable, "-m", "llmpruner", "prune", str(model), "-o", str(out), "--ratio", "0.2", "--no-tokenizer"),
        *options,
    ]


def checksums(folder: Path) -> str:
    """One digest of all safetensors files and of the plan."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    digest.update(json.dumps(json.loads((folder / "llmpruner.json").read_text())["plans"]).encode())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
