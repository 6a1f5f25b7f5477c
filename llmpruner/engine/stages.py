"""What a run took: ``run.json`` in a checkpoint, and in the folder of every step of a recipe. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from ..files import read_json, write_text
from ..models.record import RUN_FILE


@dataclass
class Stages:
    """The stages of one run by name, but for those that an interrupted run had finished."""

    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times what is inside. Stages of one name are added up."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began + self.done.get(name, {"seconds": 0.0})["seconds"]
        self.done[name] = {"name": name, "seconds": round(seconds, 2), "peak_bytes": peak_memory()}


def write_run(
    directory: Path, stages: Stages, command: str, model: str, settings: Mapping[str, Any], device: str,
    seconds: float | None,
) -> None:  # fmt: skip
    """Write ``run.json``. ``model``: the reference to it; ``settings``: what the user set, as JSON values; ``device``:
    that computed; ``seconds``: since the command began, see `Progress.seconds`."""
    libraries = ("llmpruner", "torch", "transformers")
    value = {
        "command": command,
        "model": model,
        "settings": dict(settings),
        "stages": list(stages.done.values()),
        "seconds": seconds or round(sum(stage["seconds"] for stage in stages.done.values()), 1),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory": psutil.virtual_memory().total,
            "device": device,
        },
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in libraries}},
    }
    write_text(directory / RUN_FILE, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_step(directory: Path, inputs: Mapping[str, Any], **facts: Any) -> None:
    """Add the step of a recipe that made ``directory`` to its ``run.json``, which only checkpoints have before."""
    file = directory / RUN_FILE
    run = read_json(file) if file.is_file() else {"command": inputs["command"], "settings": inputs["settings"]}
    value = {**run, "step": {**facts, "inputs": inputs}}
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_step(directory: Path) -> dict[str, Any] | None:
    """``number``, ``name``, ``seconds``, ``result``, ``inputs`` of the finished step of a recipe; None without one."""
    file = directory / RUN_FILE
    return read_json(file).get("step") if file.is_file() else None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def peak_memory() -> int | None:
    """The most bytes of memory that this process has taken so far; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    # Bytes on macOS, KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
