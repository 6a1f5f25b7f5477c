"""Output to the terminal: results on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, track
from rich.progress import Progress as Bar
from rich.table import Table

from ..progress import Progress
from ..values import bytes_text as size
from ..values import count_text as count

__all__ = [
    "RichProgress", "count", "done_line", "err", "error_line", "note", "out", "print_json", "size", "table",
    "warning_line",
]  # fmt: skip

T = TypeVar("T")

_WIDTH = 160
"""Columns where the output is no terminal, so that rows of tables in files and pipes are not broken."""


def _console(stream: TextIO, *, stderr: bool = False) -> Console:
    fits = stream.isatty() or "COLUMNS" in os.environ
    return Console(stderr=stderr, width=None if fits else _WIDTH)


out = _console(sys.stdout)
err = _console(sys.stderr, stderr=True)

_NARROWEST = 5
"""Columns to which a column of text is reduced before numbers are broken."""
_LINE_EVERY = 60.0
"""Seconds between two lines about a bar where standard error is not a terminal."""


class _Lines(logging.Handler):
    """Shows log records of the library as warnings, one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        warning_line(record.getMessage())


def show_warnings() -> None:
    """Show warnings of the library on the terminal."""
    logger = logging.getLogger("llmpruner")
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines())


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
    """Print a table; the first ``left`` columns are text, the others are numbers, which are not broken as long as they
    fit beside columns of text that are."""
    shown = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, cells)) for cells in zip_longest(columns, *shown, fillvalue="")]
    # Three columns around each cell, and one at the end.
    least = sum(min(width, _NARROWEST) for width in widths[:left]) + sum(widths[left:]) + 3 * len(columns) + 1
    grid = Table(header_style="bold cyan")
    for number, column in enumerate(columns):
        is_text = number < left
        whole = not is_text and least <= out.width
        grid.add_column(column, justify="left" if is_text else "right", overflow="fold", no_wrap=whole)
    for row in shown:
        grid.add_row(*map(escape, row))
    if title is not None:
        # A title of the table itself is broken at the width of the table.
        out.print(f"[bold]{escape(title)}[/]", highlight=False)
    out.print(grid)


class _EveryMinute:
    """Says how far a work is: a line a minute, for standard error that is not a terminal, where a bar would leave blank
    lines."""

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()

    def at(self, label: str, share: float, detail: str = "") -> None:
        """``share``: of the work that is done."""
        now = time.monotonic()
        if now - self.said >= _LINE_EVERY:
            self.said = now
            note(", ".join(filter(None, (label, f"{share:.0%} done", detail, time_left(now - self.began, share)))))


class RichProgress(Progress):
    """Bars and notes on standard error."""

    def track(self, items: Sequence[T], label: str) -> Iterable[T]:
        if err.is_terminal:
            return track(items, description=escape(label), console=err, transient=True)
        return self._said(items, label)

    def _said(self, items: Sequence[T], label: str) -> Iterator[T]:
        lines = _EveryMinute()
        for number, item in enumerate(items):
            lines.at(label, number / len(items))
            yield item

    @contextlib.contextmanager
    def counter(self, label: str) -> Iterator[Callable[[int, int, float], None]]:
        if not err.is_terminal:
            lines = _EveryMinute()
            yield lambda number, total, loss: lines.at(label, number / total, f"loss {loss:.3f}")
            return
        columns = (*Bar.get_default_columns(), TextColumn("{task.fields[detail]}"))
        with Bar(*columns, console=err, transient=True) as bar:
            task = bar.add_task(escape(label), total=None, detail="")

            def step(number: int, total: int, loss: float) -> None:
                bar.update(task, completed=number, total=total, detail=f"loss {loss:.3f}")

            yield step

    @contextlib.contextmanager
    def bar(self, label: str) -> Iterator[Callable[[float, str], None]]:
        if not err.is_terminal:
            lines = _EveryMinute()
            yield lambda share, now: lines.at(now, share)
            return
        began = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
        )
        with Bar(*columns, console=err, transient=True) as shown:
            task = shown.add_task(escape(label), total=1.0, left="")

            def at(share: float, now: str) -> None:
                left = time_left(time.monotonic() - began, share)
                shown.update(task, completed=share, description=escape(now), left=left)

            yield at

    def status(self, label: str) -> None:
        note(label)


def time_left(seconds: float, share: float) -> str:
    """The time that the rest takes at the speed so far, in words; empty before there is one. ``seconds``: since the
    start; ``share``: of the work that is done."""
    if not 0 < share < 1:
        return ""
    left = seconds * (1 - share) / share
    if left < 90:
        return f"{left:.0f} s left"
    return f"{left / 60:.0f} min left" if left < 5400 else f"{left / 3600:.1f} h left"
