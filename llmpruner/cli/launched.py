"""The command line in a process that ``torchrun`` or ``accelerate launch`` started together with others."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from ..engine.launch import launched
from ..errors import LlmprunerError, ProcessError, SettingsError
from .console import error_line

_TOGETHER = ("plan", "prune", "recover")
_ALONE = (
    "bench", "demo", "discover", "evaluate", "export", "generate", "new-plugin", "plugins",
    "recipes", "report", "run", "sensitivity", "verify",
)  # fmt: skip


def shares_work(arguments: Sequence[str]) -> bool:
    """Whether several processes were started for a command that shares work between them. Commands of plugins
    organise their processes themselves. Raises `SettingsError` for a command that each would repeat."""
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if not launched() or "--help" in arguments:
        return False
    if command in _ALONE:
        raise SettingsError(
            f"`llmpruner {command}` runs in one process; start it without torchrun or accelerate launch"
        )
    return command in _TOGETHER


def is_first() -> bool:
    """Whether this process writes the output: with several, only the first does."""
    return not launched() or os.environ["RANK"] == "0"


def let_first_print() -> None:
    """Wait in the others: a launcher ends all processes as soon as one has ended."""
    if not is_first():
        time.sleep(2)


def run_together(run: Callable[[], object], *, debug: bool) -> NoReturn:
    """Run the command, and exit. All but the first process are silent, except that one of them, the first to fail,
    writes the line of an error."""
    from ..engine.ranks import Ranks

    ranks = None
    try:
        ranks = Ranks.current()
        # A launcher ends the other processes when one ends.
        signal.signal(signal.SIGTERM, _ended)
        with contextlib.nullcontext() if ranks.first else _silent():
            run()
    except LlmprunerError as error:
        if ranks is None or ranks.claim("error"):
            if debug:
                raise
            error_line(str(error))
        _exit(2)
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if code or ranks is None:
            let_first_print()
            _exit(code)
        ranks.leave()
        sys.exit(0)
    raise AssertionError("click ends with SystemExit")


def _ended(*_: object) -> NoReturn:
    from ..engine.ranks import ENDED

    raise ProcessError(ENDED)


def _exit(code: int) -> NoReturn:
    """Without the clean-up of libraries at the end of a process, which may wait for processes that have ended."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - handlers of logs may keep it
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
