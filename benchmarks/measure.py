"""Running a command in a process of its own and measuring it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any


def run(*arguments: str, timeout: int = 3600) -> dict[str, Any]:
    """``llmpruner ARGUMENTS``: wall seconds, peak resident MiB, and standard output. Raises on a non-zero exit.

    Import no torch into the process that calls this: Linux counts what a parent holds into its child's peak.
    """
    started = time.monotonic()
    command = [sys.executable, "-m", "llmpruner", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {status}")
    return {
        "command": "llmpruner " + " ".join(arguments),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "output": output,
    }


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = next(
        (line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),  # noqa: PTH123, SIM115
        platform.processor(),
    )
    packages = ("torch", "transformers", "peft", "lm-eval")
    return {"cpu": model, "cores": os.cpu_count(), "versions": {p: version(p) for p in packages}}


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
