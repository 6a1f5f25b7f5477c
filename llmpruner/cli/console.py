"""Output to the terminal: results on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as Bar
from rich.progress import TextColumn, track
from rich.table import Table

from ..amounts import bytes_text as size
from ..amounts import count_text as count
from ..progress import Progress

__all__ = ["RichProgress", "count", "err", "error_line", "note", "out", "print_json", "size", "table", "warning_line"]

T = TypeVar("T")

out = Console()
err = Console(stderr=True)


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


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))  # noqa: T201


def table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, left: int = 1) -> None:
    """Print a table; the first ``left`` columns are text, the others are numbers."""
    grid = Table(title=title, title_justify="left", title_style="bold", header_style="bold cyan")
    for number, column in enumerate(columns):
        grid.add_column(column, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(escape(str(cell)) for cell in row))
    out.print(grid)


class RichProgress(Progress):
    """Bars and notes on standard error."""

    def track(self, items: Sequence[T], label: str) -> Iterable[T]:
        return track(items, description=label, console=err, transient=True)

    @contextlib.contextmanager
    def counter(self, label: str) -> Iterator[Callable[[int, int, float], None]]:
        columns = (*Bar.get_default_columns(), TextColumn("{task.fields[detail]}"))
        with Bar(*columns, console=err, transient=True) as bar:
            task = bar.add_task(label, total=None, detail="")

            def step(number: int, total: int, loss: float) -> None:
                bar.update(task, completed=number, total=total, detail=f"loss {loss:.3f}")

            yield step

    def status(self, label: str) -> None:
        note(label)
