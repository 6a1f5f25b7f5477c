"""``llmpruner``, and ``python -m llmpruner``."""

import os
import signal
import sys
from pathlib import Path


def main() -> None:
    """Entry point of the ``llmpruner`` command."""
    # Python's own handler would show a traceback of whatever is being imported; nothing is to be tidied up before.
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if own:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _open_closed_streams()
    from .cli import main as command

    if own:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command()


def _open_closed_streams() -> None:
    """Put the null device in the place of standard streams that the process was started without (``>&-``): Python has
    None for them, and the next file that is opened would take their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


if __name__ == "__main__":
    main()
