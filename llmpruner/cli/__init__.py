"""The command line. `main` turns every `LlmprunerError`, and lack of disk or memory, into one line and exit code 2."""

from __future__ import annotations

import sys

from . import app
from .console import error_line
from .process import (
    exit_on_sigterm,
    is_first,
    keep_freed_memory,
    let_first_print,
    message_of,
    run_together,
    shares_work,
)


def main() -> None:
    """Run the ``llmpruner`` command. ``--debug``, in any position, shows tracebacks."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    keep_freed_memory()
    exit_on_sigterm()
    try:
        if shares_work(arguments):
            run_together(lambda: app.build_app()(args=arguments, prog_name="llmpruner"), debug=debug)
        app.build_app()(args=arguments, prog_name="llmpruner")
    except Exception as error:
        line = message_of(error)
        if debug or line is None:
            raise
        if is_first():
            error_line(line)
        let_first_print()
        sys.exit(2)
