"""Output to the terminal: results on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import psutil
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as Bar
from rich.table import Table

from ..files import weights_size
from ..models.record import read_record
from ..progress import Progress
from ..values import bytes_text

_WIDTH = 160  # columns where the output is no terminal, so that rows of tables in files and pipes are not broken
_LINE_EVERY = 60.0  # seconds between lines of progress where standard error is no terminal


def _console(stream: TextIO, *, stderr: bool = False) -> Console:
    fits = stream.isatty() or "COLUMNS" in os.environ
    # Emoji would replace what stands between colons, as in a path or an answer.
    return Console(stderr=stderr, width=None if fits else _WIDTH, emoji=False)


out = _console(sys.stdout)
err = _console(sys.stderr, stderr=True)


def error_line(message: str) -> None:
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


def warning_line(message: str) -> None:
    err.print(f"[yellow]warning:[/] {escape(message)}", soft_wrap=True)


def note(message: str) -> None:
    """Print a line about the current step of the work."""
    err.print(f"[dim]•[/] {escape(message)}", soft_wrap=True)


def done_line(message: str) -> None:
    """Print what was written, on standard output."""
    out.print(f"[bold green]✓[/] {escape(message)}", highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))  # noqa: T201


def table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, left: int = 1) -> None:
    """Print a table; the first ``left`` columns are text, the others are numbers, which are not broken."""
    grid = Table(header_style="bold cyan")
    for column in columns[:left]:
        grid.add_column(column, overflow="fold")
    for column in columns[left:]:
        grid.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        grid.add_row(*(escape(str(cell)) for cell in row))
    if title is not None:
        # A title of the table itself is broken at the width of the table.
        out.print(f"[bold]{escape(title)}[/]", highlight=False)
    out.print(grid)


def sizes_text(output: Path, checkpoint: str | Path) -> str:
    """Bytes of the weights in ``output`` and of the dense model of ``checkpoint``; a hint where they are more."""
    source = Path((read_record(checkpoint) or {}).get("base_path") or checkpoint)
    after, before = weights_size(output), weights_size(source)
    if not (after and before) or source == output:
        return ""
    hint = "; --dtype float16 or bfloat16 keeps 16 bits"
    if source.suffix == ".gguf":
        hint = "; quantise it: export --to gguf --set gguf.quant=q4_k_m, or llama-quantize"
    return f"{bytes_text(after)} of weights ({source.name}: {bytes_text(before)}){hint if after > before else ''}; "


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warning_line(record.getMessage())


logging.getLogger("llmpruner").addHandler(_Warnings())


class RichProgress(Progress):
    """Bars and notes on standard error; where that is no terminal, a line a minute instead of a bar."""

    def __init__(self) -> None:
        self._last_line = time.monotonic()

    @contextlib.contextmanager
    def bar(self, label: str) -> Iterator[Callable[[float, str], None]]:
        if err.is_terminal:
            # A step may take minutes; by default, the time left is estimated from the last 30 seconds.
            with Bar(console=err, transient=True, speed_estimate_period=3600) as bar:
                task = bar.add_task(escape(label), total=1.0)
                yield lambda share, now: bar.update(task, completed=share, description=escape(now))
            return
        began = time.monotonic()

        def line(share: float, now: str) -> None:
            if time.monotonic() - self._last_line >= _LINE_EVERY:
                left = timedelta(seconds=round((time.monotonic() - began) * (1 - share) / share)) if share else None
                self.status(f"{now}, {share:.0%} done" + (f", {left} left" if share else ""))

        yield line

    def seconds(self) -> float:
        return round(time.time() - psutil.Process().create_time(), 1)

    def status(self, label: str) -> None:
        self._last_line = time.monotonic()
        note(label)
