"""Components of every kind, written with public names alone."""

import typer

from llmpruner import hookimpl

from .allocation import Tapered
from .budget import MatrixParameters
from .compensation import KeepNorm
from .examples import Imitation, Magnitude, Slow, Vocabulary, Weights
from .loading import Pointer, Unknown
from .method import Cautious
from .section import Widths
from .source import Counting
from .strategy import Nothing


@hookimpl
def llmpruner_allocations():
    return [Tapered]


@hookimpl
def llmpruner_budgets():
    return [MatrixParameters]


@hookimpl
def llmpruner_compensations():
    return [KeepNorm]


@hookimpl
def llmpruner_calibration_sources():
    return [Counting]


@hookimpl
def llmpruner_importance_criteria():
    return [Magnitude]


@hookimpl
def llmpruner_metrics():
    return [Vocabulary]


@hookimpl
def llmpruner_exporters():
    return [Weights]


@hookimpl
def llmpruner_runtimes():
    return [Slow]


@hookimpl
def llmpruner_report_sections():
    return [Widths]


@hookimpl
def llmpruner_methods():
    return [Cautious]


@hookimpl
def llmpruner_model_families():
    return [Unknown]


@hookimpl
def llmpruner_recovery_strategies():
    return [Nothing, Imitation]


@hookimpl
def llmpruner_checkpoint_readers():
    return [Pointer]


@hookimpl
def llmpruner_commands(app: typer.Typer):
    @app.command()
    def hello(name: str = "world"):
        """Greet someone."""
        typer.echo(f"hello, {name}")
