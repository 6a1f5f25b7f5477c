"""The process that a command runs in: signals, memory, and other processes that a launcher started with it."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ..component import Component
from ..errors import LlmprunerError, ProcessError, SettingsError, first_line, is_out_of_memory
from ..files import write_failure
from ..progress import is_first, launched
from .console import error_line


def keep_freed_memory() -> None:
    """Let glibc keep up to 1 GiB of freed memory for tensors, where the system would clear new pages for each. The
    logits of a batch in recovery are some 200 MB."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # in glibc's malloc.h
        if not mallopt(mmap_threshold, 1 << 30):  # older versions take at most 32 MiB
            mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 1 << 30)
        mallopt(top_pad, 64 << 20)


def exit_on_sigterm() -> None:
    """Let SIGTERM end the process as an exit does, so that temporary files are removed."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # While the interpreter ends, the exception would only be printed, as a traceback.
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)


def run(command: Callable[[], object], arguments: Sequence[str], *, debug: bool) -> None:
    """Run a command, which exits: a `LlmprunerError`, or lack of disk or memory, with one line and code 2, or with
    ``debug`` a traceback. Of several processes, the first prints, but errors the one that fails first."""
    ranks = None
    try:
        if _shares_work(arguments):
            from ..engine.ranks import Ranks

            ranks = Ranks.current()
            # A launcher ends the other processes when one ends.
            signal.signal(signal.SIGTERM, _ended)
        with contextlib.ExitStack() as stack:
            if ranks is not None and not ranks.first:
                nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - handlers of logs may keep it
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            command()
    except Exception as error:
        if ranks is not None:  # else it may raise once more, while this process waits for the first to print
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        line = _message_of(error) or _failed_plugin(error)
        if line is None:
            raise
        # Of processes that cannot connect, the first one says so, or has failed before and said why.
        if ranks.claim("error") if ranks else is_first():
            if debug:
                raise
            error_line(line)
        _exit(2)
    except SystemExit as exit:
        if launched() and exit.code:
            _exit(exit.code if isinstance(exit.code, int) else 1)
        if ranks is not None:
            ranks.leave()
        raise


def _shares_work(arguments: Sequence[str]) -> bool:
    """Whether several processes share this command's work. Raises `SettingsError` for one that each would repeat."""
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if not launched() or "--help" in arguments or command is None:
        return False
    if command not in ("plan", "prune", "recover"):
        raise SettingsError(
            f"`llmpruner {command}` runs in one process; start it without torchrun or accelerate launch"
        )
    return True


def _message_of(error: Exception) -> str | None:
    """The line for the user; None for a defect of the program, and for other errors of the system."""
    if isinstance(error, LlmprunerError):
        return str(error)
    if (reason := write_failure(error)) is not None:
        return f"an output cannot be written: {reason}"
    if is_out_of_memory(error):
        hint = "--max-memory of plan and prune, fewer or shorter samples, a smaller batch or --dtype, or --device cpu"
        return f"out of memory ({first_line(error)}); what helps: {hint}"
    return None


def _failed_plugin(error: Exception) -> str | None:
    """The component of a plugin that raised an exception, and where; None for defects of the core."""
    frames = list(traceback.walk_tb(error.__traceback__))
    components = [frame.f_locals["self"] for frame, _ in frames if isinstance(frame.f_locals.get("self"), Component)]
    of_plugins = [each for each in components if not type(each).__module__.startswith("llmpruner.")]
    if not of_plugins:
        return None
    component, package = of_plugins[-1], type(of_plugins[-1]).__module__.partition(".")[0]
    places = [
        (Path(frame.f_code.co_filename).name, line)
        for frame, line in frames
        if frame.f_globals.get("__name__", "").partition(".")[0] == package
    ]
    if not places:  # the core failed in a method that the component inherits
        return None
    what = f"{component.label()} of {package} failed in {places[-1][0]}, line {places[-1][1]}"
    return f"{what}: {type(error).__name__}: {first_line(error)}; --debug shows the traceback"


def _ended(*_: object) -> NoReturn:
    from ..engine.ranks import ENDED

    raise ProcessError(ENDED)


def _exit(code: int) -> NoReturn:
    if not launched():
        sys.exit(code)
    # A launcher ends all processes as soon as one has ended, and another may still print, or ask whether it may.
    time.sleep(2)
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the clean-up of libraries, which may wait for processes that have ended.
    os._exit(code)
