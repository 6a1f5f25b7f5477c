"""One component of every kind, written with public names alone."""

from llmpruner import hookimpl

from .allocation import Tapered
from .budget import MatrixParameters
from .compensation import KeepNorm
from .criterion import Magnitude
from .exporter import OneFile
from .method import Cautious
from .metric import Accuracy
from .runtime import WithoutCache
from .section import Widths
from .source import Counting


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
    return [Accuracy]


@hookimpl
def llmpruner_exporters():
    return [OneFile]


@hookimpl
def llmpruner_runtimes():
    return [WithoutCache]


@hookimpl
def llmpruner_report_sections():
    return [Widths]


@hookimpl
def llmpruner_methods():
    return [Cautious]
