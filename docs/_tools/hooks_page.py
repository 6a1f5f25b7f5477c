"""The hook reference: every hook, the class it returns, and what a class hands over."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from docstrings import attributes, document, markdown, methods, signature_of

import llmpruner
from llmpruner.budgets.base import BudgetSubject
from llmpruner.compensation.base import Fit, Repaired, RepairTask
from llmpruner.data.source import SampleTask
from llmpruner.engine.signals import InputStats, ParameterSignals, Signal, StreamStats
from llmpruner.evaluation.base import MetricSubject, Row
from llmpruner.exporters.base import ExportTask
from llmpruner.plugins import hookspecs
from llmpruner.plugins.catalog import KINDS
from llmpruner.plugins.manager import HOOKS
from llmpruner.recovery.base import RecoveryJob, TrainingResult
from llmpruner.report.base import ReportSubject
from llmpruner.selection.base import AllocationTask, Demand, Meter

_HANDED: dict[str, tuple[type, ...]] = {
    "criterion": (Signal, ParameterSignals, InputStats, StreamStats),
    "allocation": (AllocationTask, Demand, Meter),
    "budget": (BudgetSubject,),
    "compensation": (RepairTask, Repaired, Fit),
    "calibration source": (SampleTask,),
    "recovery strategy": (RecoveryJob, TrainingResult),
    "metric": (MetricSubject, Row),
    "exporter": (ExportTask,),
    "report section": (ReportSubject,),
}
"""Kind of component → the classes that it is handed or hands back."""

CLASSES: dict[str, tuple[type, ...]] = {kind.hook: (kind.base, *_HANDED.get(name, ())) for name, kind in KINDS.items()}
"""Hook → the class it returns, then those that class is handed or hands back."""


def hooks() -> dict[str, Any]:
    """Every hookspec by name, in the order of the source."""
    return HOOKS


def promise() -> list[str]:
    """One line for each thing that a plugin may rely on while `HOOK_VERSION` stays: names, arguments and defaults."""
    lines = [f"{name}{_arguments(spec)}" for name, spec in hooks().items()]
    for cls in (cls for classes in CLASSES.values() for cls in classes):
        lines += [f"{cls.__name__}.{name}" for name in attributes(cls)]
        for name, member in methods(cls).items():
            lines.append(f"{cls.__name__}.{name}" + ("" if isinstance(member, property) else _arguments(member)))
    return lines


def _arguments(function: Any) -> str:
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


def render() -> str:
    lines = ["# Hooks", "", markdown(document(hookspecs)), ""]
    lines += [f"This is version {hookspecs.HOOK_VERSION} of the hooks (`llmpruner.HOOK_VERSION`).", ""]
    lines += ["| hook | gives |", "|---|---|"]
    for name, spec in hooks().items():
        first, _, _ = document(spec).partition("\n")
        lines.append(f"| [`{name}`](#{name}) | {markdown(first).rstrip('.')} |")
    for name, spec in hooks().items():
        lines += [
            "",
            f"## {name}",
            "",
            *_member(spec, name),
            *(line for cls in CLASSES.get(name, ()) for line in _class(cls)),
        ]
    return "\n".join(lines) + "\n"


def _class(cls: type) -> Iterator[str]:
    yield from ("", f"### {cls.__name__}", "")
    if cls.__name__ in llmpruner.__all__:
        yield from (f"`from llmpruner import {cls.__name__}`", "")
    yield from (markdown(document(cls)), "")
    for declaration, text in attributes(cls).values():
        yield f"- `{declaration}`" + (f": {markdown(text)}" if text else "")
    for name, member in methods(cls).items():
        yield from ("", f"#### {cls.__name__}.{name}", "", *_member(member, name))


def _member(member: Any, name: str) -> list[str]:
    text = re.sub(r"^(Returns|Called|Errors):", r"*\1:*", markdown(document(member)), flags=re.M)
    return ["```python", signature_of(member, name), "```", "", text]
