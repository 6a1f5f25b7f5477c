"""The hook reference: every hook, the class it returns, and what a class is given or gives back."""

from __future__ import annotations

from typing import Any

from docstrings import class_section, document, function_lines, markdown

from llmpruner.calibration.base import SampleTask
from llmpruner.component import Component, ComponentSettings
from llmpruner.evaluation.bench import BenchSubject, Session, Work, work_of
from llmpruner.evaluation.evaluate import ComparedModel, MetricSubject, Row
from llmpruner.evaluation.metrics import Size
from llmpruner.exporters import ExportTask
from llmpruner.models.chat_format import ChatFormat
from llmpruner.plugins import hookspecs
from llmpruner.plugins.installed import KINDS
from llmpruner.pruning.allocation import AllocationTask, Meter, top_up
from llmpruner.pruning.budgets import BudgetSubject, Cost
from llmpruner.pruning.compensation.base import RepairTask
from llmpruner.pruning.compensation.least_squares import Fit
from llmpruner.recovery.base import RecoveryJob, TrainingResult
from llmpruner.recovery.training import fit
from llmpruner.report.base import Costs, ReportSubject
from llmpruner.structure.scope import Queue

_GIVEN: dict[str, tuple[type, ...]] = {
    "family": (ChatFormat,),
    "allocation": (AllocationTask, Meter, Queue),
    "budget": (BudgetSubject, Cost),
    "compensation": (RepairTask, Fit),
    "calibration source": (SampleTask,),
    "recovery strategy": (RecoveryJob, TrainingResult),
    "metric": (MetricSubject, Row, ComparedModel),
    "exporter": (ExportTask,),
    "runtime": (BenchSubject, Session, Work),
    "report section": (ReportSubject, Costs, Size),
}
"""Kind of component → the classes that it is given or gives back."""
CLASSES: dict[str, tuple[type, ...]] = {
    **{base.hook: (base, *_GIVEN.get(kind, ())) for kind, base in KINDS.items()},
    "llmpruner_commands": (),
}
"""Hook → the class that it returns, then those that this class is given or gives back."""
SHARED = (Component, ComponentSettings)
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "llmpruner_allocations": (top_up,),
    "llmpruner_recovery_strategies": (fit,),
    "llmpruner_runtimes": (work_of,),
}
"""Hook → functions that implementations share."""
LINKS = {
    "llmpruner_model_families": "Spans, groups and layouts are on the page [Structure and signals](structure.md).",
    "llmpruner_importance_criteria": "What a criterion is shown is on the page "
    "[Structure and signals](structure.md#signals).",
}


def hooks() -> dict[str, Any]:
    """Every hookspec by name, in the order of the source."""
    return {name: spec for name, spec in vars(hookspecs).items() if name.startswith("llmpruner_")}


def render() -> str:
    lines = ["# Hooks", "", markdown(document(hookspecs)), ""]
    lines += ["| hook | gives |", "|---|---|"]
    for name, spec in hooks().items():
        first, _, _ = document(spec).partition("\n")
        lines.append(f"| [`{name}`](#{name}) | {markdown(first).rstrip('.')} |")
    lines += ["", "## What all classes share", "", *(line for cls in SHARED for line in class_section(cls))]
    for name, spec in hooks().items():
        lines += ["", f"## {name}", "", *function_lines(spec, name)]
        lines += ["", LINKS[name]] if name in LINKS else []
        lines += [line for cls in CLASSES.get(name, ()) for line in class_section(cls)]
        for function in FUNCTIONS.get(name, ()):
            lines += ["", f"### {function.__name__}", ""]
            lines += function_lines(function, function.__name__)
    return "\n".join(lines) + "\n"
