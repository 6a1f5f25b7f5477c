"""A function in a process of its own, with limits on time and memory, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

MEMORY_LIMIT = 9 << 30
"""Bytes of address space."""
PRELOAD = (
    "torch._dynamo", "torch.export", "transformers.modeling_utils", "transformers.generation", "accelerate",
    "llmpruner.models.save", "llmpruner.discovery.groups", "llmpruner.discovery.verify", "llmpruner.api",
)  # fmt: skip
_CONTEXT = multiprocessing.get_context("forkserver")


def prepare() -> None:
    """Import what children need, before the first one."""
    _CONTEXT.set_forkserver_preload(list(PRELOAD))


def in_child(run: Callable[..., dict[str, Any]], arguments: Sequence[Any], *, seconds: float) -> dict[str, Any]:
    """The result of ``run(*arguments)``; where there is none, ``stage`` ("time limit" or "crash") and ``reason``."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_child, args=(run, arguments, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            result: dict[str, Any] = receiver.recv()
            return result
        return {"stage": "time limit", "reason": f"not finished within {seconds:g} s"}
    except EOFError:
        process.join()
        return {"stage": "crash", "reason": f"the process ended with status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _child(run: Callable[..., dict[str, Any]], arguments: Sequence[Any], sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    sender.send(run(*arguments))
