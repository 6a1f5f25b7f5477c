"""The command line. `main` turns every `LlmprunerError`, and want of disk or memory, into one line and exit code 2."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
from typing import NoReturn

import typer

from ..allocator import keep_freed_memory
from ..errors import LlmprunerError, SettingsError, first_line, is_out_of_memory
from ..files import write_failure
from .console import error_line
from .launched import is_first, let_first_print, run_together, shares_work


def _app() -> typer.Typer:
    from .app import build_app

    return build_app()


def main() -> None:
    """Run the ``llmpruner`` command. ``--debug``, in any position, shows tracebacks."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if "--help" in arguments:
        # Looking for garbage among all that is imported takes time.
        gc.disable()
    else:
        keep_freed_memory()
    ended_by: list[int] = []
    if threading.current_thread() is threading.main_thread():
        _end_as_exits(ended_by)
    debug = len(arguments) < len(sys.argv) - 1 or bool(os.environ.get("LLMPRUNER_DEBUG"))
    try:
        _check_text(arguments)
        if shares_work(arguments):
            run_together(lambda: _app()(args=arguments, prog_name="llmpruner"), debug=debug)
        _app()(args=arguments, prog_name="llmpruner")
    except KeyboardInterrupt:
        if debug:
            raise
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if ended_by and not debug:
            # While it is imported, a library may turn the end of the process into an error of its own.
            sys.exit(128 + ended_by[0])
        line = _line(error)
        if debug or line is None:
            raise
        if is_first():
            error_line(line)
        let_first_print()
        sys.exit(2)
    finally:
        gc.enable()


def _line(error: Exception) -> str | None:
    """What a user is told of ``error``; None for a defect of the program, and for other errors of the system."""
    if isinstance(error, LlmprunerError):
        return str(error)
    # A full disk and full memory can show anywhere.
    if (reason := write_failure(error)) is not None:
        return f"an output cannot be written: {reason}"
    if is_out_of_memory(error):
        return (
            f"memory is too small for this run ({first_line(error)}); take fewer or shorter samples, a smaller batch "
            "or a smaller --dtype, or a machine with more of it"
        )
    return None


def _check_text(arguments: list[str]) -> None:
    """Raise `SettingsError` for bytes that are no UTF-8, which neither JSON files nor tokenizers take."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            shown = argument.encode(errors="backslashreplace").decode()
            raise SettingsError(f"the argument '{shown}' is not UTF-8 text; give paths and texts in UTF-8") from None


def _end_as_exits(ended_by: list[int]) -> None:
    """Let SIGTERM end the process as an exit does, and SIGINT as Python does, so that temporary files are removed; the
    number of the signal is put into ``ended_by``."""

    def terminated(number: int, _: object) -> NoReturn:
        ended_by.append(number)
        sys.exit(128 + number)

    def interrupted(number: int, _: object) -> NoReturn:
        ended_by.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminated)
    # While the interpreter ends, the exception would only be printed, as a traceback.
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)
