"""The command line. `main` turns every `LlmprunerError` into one line and exit code 2."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import NoReturn

from ..allocator import keep_freed_memory
from ..errors import LlmprunerError
from .app import build_app
from .console import error_line
from .launched import is_first, let_first_print, run_together, shares_work


def main() -> None:
    """Entry point of the ``llmpruner`` command. ``--debug``, in any position, shows tracebacks."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if "--help" not in arguments:
        keep_freed_memory()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)
    debug = len(arguments) < len(sys.argv) - 1 or bool(os.environ.get("LLMPRUNER_DEBUG"))
    try:
        if shares_work(arguments):
            run_together(lambda: build_app()(args=arguments, prog_name="llmpruner"), debug=debug)
        build_app()(args=arguments, prog_name="llmpruner")
    except LlmprunerError as error:
        if debug:
            raise
        if is_first():
            error_line(str(error))
        let_first_print()
        sys.exit(2)


def _terminated(number: int, _: object) -> NoReturn:
    """End as at an exit, so that temporary files are removed."""
    sys.exit(128 + number)
