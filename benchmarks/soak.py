"""Many prunes in one process: does it take more and more memory, open files or threads?

    python -m benchmarks.soak FOLDER [--cycles N]

Each cycle prunes the tiny model of `benchmarks.tiny_checkpoints` in FOLDER by another ratio with calibration text,
saves it, loads it, generates a few tokens, and removes it. Prints a line of JSON: a `Use` for each tenth of the cycles.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from .tiny_checkpoints import Work

GROWTH = 32
"""MiB: more, after the first fifth of the cycles, is a leak. The allocator's own use varies by a few."""


@dataclass(frozen=True)
class Use:
    """Of the process after ``cycles``: resident memory in MiB, open files, threads of Python, and objects that its
    collector knows."""

    cycles: int
    mib: float
    files: int
    threads: int
    objects: int


def soak(work: Work, cycles: int) -> list[Use]:
    """In a process of its own."""
    command = [sys.executable, "-m", "benchmarks.soak", str(work.folder), "--cycles", str(cycles)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return [Use(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def grown(uses: Sequence[Use]) -> str:
    """What grew between the first fifth and the last tenth of the cycles; empty where nothing did."""
    first, last = uses[1], uses[-1]
    if last.mib - first.mib > GROWTH:
        return f"resident memory grew from {first.mib:.0f} to {last.mib:.0f} MiB"
    if last.files > first.files or last.threads > first.threads:
        return f"{last.files - first.files} files and {last.threads - first.threads} threads were left"
    # Caches may fill slowly: one object a cycle.
    if last.objects - first.objects > last.cycles:
        return f"{last.objects - first.objects} objects were left"
    return ""


def _use(cycles: int) -> Use:
    gc.collect()
    process = psutil.Process()
    mib = process.memory_info().rss / 2**20
    return Use(cycles, round(mib, 1), process.num_fds(), threading.active_count(), len(gc.get_objects()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cycles", type=int, default=200)
    given = parser.parse_args()
    import llmpruner

    work, uses = Work(given.folder), []
    out = work.folder / "soaked"
    for cycle in range(given.cycles):
        llmpruner.prune(
            work.dense, ratio=0.1 + 0.1 * (cycle % 3), calibration=work.text, samples=8, length=32,
            shape=("uniform", "free")[cycle % 2], output=out,
        )  # fmt: skip
        llmpruner.generate(llmpruner.load(out), "The quick", max_new_tokens=4)
        shutil.rmtree(out)
        if (cycle + 1) % max(1, given.cycles // 10) == 0:
            uses.append(_use(cycle + 1))
    print(json.dumps([asdict(use) for use in uses]))


if __name__ == "__main__":
    main()
