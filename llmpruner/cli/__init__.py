"""The command line. `main` turns every `LlmprunerError`, and want of disk or memory, into one line and exit code 2."""

from __future__ import annotations

import gc
import os
import sys

import typer

from ..errors import LlmprunerError, first_line, is_out_of_memory
from ..files import write_failure
from .console import error_line
from .process import end_as_exits, is_first, keep_freed_memory, let_first_print, run_together, shares_work


def _app() -> typer.Typer:
    from .app import build_app

    return build_app()


def main() -> None:
    """Run the ``llmpruner`` command. ``--debug``, in any position, shows tracebacks."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1 or bool(os.environ.get("LLMPRUNER_DEBUG"))
    if "--help" in arguments:
        gc.disable()  # going over all that is imported takes time
    else:
        keep_freed_memory()
    ended_by = end_as_exits()
    try:
        if shares_work(arguments):
            run_together(lambda: _app()(args=arguments, prog_name="llmpruner"), debug=debug)
        _app()(args=arguments, prog_name="llmpruner")
    except KeyboardInterrupt:
        if debug:
            raise
        sys.exit(130)
    except Exception as error:
        line = _line(error)
        if ended_by and not debug:
            # A library may turn the end of the process into an error of its own while it is imported.
            sys.exit(128 + ended_by[0])
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
            f"out of memory ({first_line(error)}); take fewer or shorter samples, a smaller batch, a "
            "smaller --dtype, or a machine with more memory"
        )
    return None
