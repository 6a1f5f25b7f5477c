"""``llmpruner``, and ``python -m llmpruner``."""

import signal


def main() -> None:
    """Entry point of the ``llmpruner`` command."""
    # Python's own handler would show a traceback of whatever is being imported; nothing is to be tidied up before.
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if own:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import main as command

    if own:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command()


if __name__ == "__main__":
    main()
