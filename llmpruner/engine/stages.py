"""What a run took: seconds and memory of its stages, and the machine; ``run.json`` in a checkpoint.

No result depends on it, so it is not in ``llmpruner.json``, which says the same wherever the checkpoint was made.
Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from ..files import write_text
from ..models.record import RUN_FILE

T = TypeVar("T")
_LIBRARIES = ("llmpruner", "torch", "transformers")


@dataclass(frozen=True)
class Stage:
    """``peak_bytes``: the most memory that the process had taken when the stage ended, earlier stages included; None
    where the system does not say."""

    name: str
    seconds: float
    peak_bytes: int | None


@dataclass
class Stages:
    """The stages of one run, in their order. Those that an interrupted run had finished are not among them."""

    done: list[Stage] = field(default_factory=list)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times what is inside. Stages of one name are added up."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        same = next((n for n, one in enumerate(self.done) if one.name == name), None)
        if same is None:
            self.done.append(Stage(name, round(seconds, 2), peak_memory()))
        else:
            self.done[same] = Stage(name, round(self.done[same].seconds + seconds, 2), peak_memory())

    def timed(self, name: str, work: Callable[[], T]) -> T:
        """The result of ``work``, which is a stage."""
        with self.stage(name):
            return work()


def write_run(directory: Path, stages: Stages, command: str, model: str, settings: Mapping[str, Any]) -> None:
    """Write ``run.json``. ``command``: ``prune`` or ``recover``; ``settings``: those that were given, as JSON
    values; ``model``: the reference to the model that was read."""
    value = {
        "command": command,
        "model": model,
        "settings": dict(settings),
        "stages": [asdict(one) for one in stages.done],
        "machine": machine(),
        "versions": versions(),
    }
    write_text(directory / RUN_FILE, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def machine() -> dict[str, Any]:
    """System, processor, number of cores, and bytes of memory."""
    import psutil

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def versions() -> dict[str, str]:
    """Python and the libraries that results depend on most."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _LIBRARIES}}


def peak_memory() -> int | None:
    """The most bytes of memory that this process has taken so far; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    # Bytes on macOS, KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def launched() -> bool:
    """Whether ``torchrun`` or ``accelerate launch`` started several processes, of which this is one."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
