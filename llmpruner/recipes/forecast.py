"""What a prune is expected to take: memory, disk and time, by stage, and how the model is held meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from ..engine.boundaries import DEFAULT_LIMIT, GIB
from ..errors import SettingsError

LATER = 96 << 20
"""Bytes of modules that are imported during the work, of the tokenizer, and of the allocator's free lists."""
SLOW_WRITING = 1800.0
"""Seconds of writing calibration text beyond which a file is suggested."""


@dataclass(frozen=True)
class Residency:
    """How a model is held. ``streamed``: read layer by layer. ``boundary_memory``: bytes of hidden states in memory.
    ``divided``: micro-batches are this many times smaller than usual. ``once``: see `open_streamed`."""

    streamed: bool = False
    boundary_memory: int = DEFAULT_LIMIT
    divided: int = 1
    once: bool = False

    def __str__(self) -> str:
        how = "the model is read layer by layer" if self.streamed else "the model is in memory"
        how += ", from files of its dequantised weights" if self.once else ""
        return how + (f", micro-batches are {self.divided} times smaller" if self.divided > 1 else "")


@dataclass(frozen=True)
class Stage:
    """``memory``: what → bytes, beside the process and the weights that are always there."""

    name: str
    memory: Mapping[str, int]
    seconds: float | None = None

    @property
    def bytes(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Forecast:
    """``memory``: largest resident bytes of the process; ``disk``: bytes that are written and lie there at one time;
    ``seconds``: None where no layer could be timed. ``base``: bytes of the process before."""

    residency: Residency
    base: int
    stages: tuple[Stage, ...]
    disk: int

    @property
    def largest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.bytes)

    @property
    def memory(self) -> int:
        return self.base + self.largest.bytes

    @property
    def largest_parts(self) -> str:
        """What takes most memory, in words."""
        parts = sorted(self.largest.memory.items(), key=lambda part: -part[1])[:3]
        return ", ".join(f"{name} {size_text(size)}" for name, size in parts)

    @property
    def seconds(self) -> float | None:
        found = [stage.seconds for stage in self.stages]
        return None if None in found else sum(s for s in found if s is not None)

    def stage(self, name: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    def as_json(self) -> dict[str, Any]:
        """JSON values: bytes and seconds."""
        return {
            "memory": self.memory,
            "disk": self.disk,
            "seconds": None if self.seconds is None else round(self.seconds, 1),
            "streamed": self.residency.streamed,
            "dequantised_once": self.residency.once,
            "boundary_memory": self.residency.boundary_memory,
            "micro_batches_divided_by": self.residency.divided,
            "process": self.base,
            "stages": {
                stage.name: {
                    "memory": dict(sorted(stage.memory.items(), key=lambda item: -item[1])),
                    "seconds": None if stage.seconds is None else round(stage.seconds, 1),
                }
                for stage in self.stages
            },
        }

    def __str__(self) -> str:
        time = "" if self.seconds is None else f" and {duration(self.seconds)}"
        disk = f", {size_text(self.disk)} of disk" if self.disk else ""
        return f"needs about {size_text(self.memory)} of memory{disk}{time} ({self.residency})"


def machine_memory() -> int:
    """Bytes of memory of this machine, free or not, with what it swaps to."""
    return int(psutil.virtual_memory().total + psutil.swap_memory().total)


def check_machine(what: str, found: Forecast, advice: str) -> None:
    """Raise `SettingsError` where the machine does not have the memory that ``what`` needs, however much of it is free.
    ``advice``: what would do."""
    most = machine_memory()
    if found.memory > most:
        raise SettingsError(
            f"{what} needs about {size_text(found.memory)} of memory ({found.largest_parts}), and this machine has "
            f"{size_text(most)}; {advice}"
        )


def size_text(number: float) -> str:
    """``1.2 GiB``, ``340 MiB`` or ``1,000 bytes``."""
    if 0 < number < 1 << 20:
        return f"{number:,.0f} bytes"
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / (1 << 20):.0f} MiB"


def duration(seconds: float) -> str:
    """``40 s``, ``3 min`` or ``2.5 h``."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
