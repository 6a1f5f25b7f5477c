"""Timing work on a device."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Of the host, for devices that compute while it waits."""

    def now(self) -> Any:
        return time.perf_counter()

    def between(self, begin: Any, end: Any) -> float:
        """Milliseconds between two results of `now`, once the work before ``end`` is done."""
        return float(end - begin) * 1e3


class CudaClock(Clock):
    """CUDA events, so that timing does not make the host wait for the device after each mark."""

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        end.synchronize()
        return float(begin.elapsed_time(end))


def clock_of(device: torch.device) -> Clock:
    """The clock for work on ``device``."""
    return CudaClock() if device.type == "cuda" else Clock()
