"""What the core offers for --importance, --method, --compensate and the rest, from its classes and tables."""

from __future__ import annotations

import inspect
import re
from types import ModuleType
from typing import Any

from docstrings import document, markdown

from llmpruner.compensation import least_squares, repair
from llmpruner.engine.signals import Signal
from llmpruner.importance import reductions
from llmpruner.importance.base import ImportanceCriterion
from llmpruner.methods.presets import METHODS
from llmpruner.plugins import builtin
from llmpruner.selection import normalize
from llmpruner.selection.allocate import ALLOCATIONS
from llmpruner.selection.search import MEASURED


def criteria() -> dict[ModuleType, list[type[ImportanceCriterion]]]:
    """The built-in criteria by the module that explains their symbols."""
    found: dict[ModuleType, list[type[ImportanceCriterion]]] = {}
    for cls in builtin.llmpruner_importance_criteria():
        found.setdefault(inspect.getmodule(cls) or builtin, []).append(cls)
    return found


def render() -> str:
    lines = ["# Criteria, methods and repairs", "", INTRODUCTION, "", "## Methods", ""]
    lines += ["| `--method` | what it is | criterion | repair | calibration |", "|---|---|---|---|---|"]
    for m in METHODS.values():
        criterion = f"`{m.importance}`" + (f" (`{m.variant}`)" if m.variant else "")
        amount = f"{m.samples} × {m.length} tokens"
        if m.written:
            amount += ", written by the model {} × {}".format(*m.written)
        lines.append(f"| `{m.name}` | {m.summary} | {criterion} | `{m.compensate}` | {amount} |")
    lines += ["", "## Criteria", ""]
    for module, classes in criteria().items():
        lines += _module(module)
        for cls in classes:
            lines += _criterion(cls)
    lines += ["## Reductions", "", markdown(document(reductions)), "", _names(reductions.REDUCTION_NAMES), ""]
    lines += ["## Allocations", ""]
    lines += [f"- `{name}`: {markdown(document(function))}" for name, function in (ALLOCATIONS | MEASURED).items()]
    lines += ["", "## Normalizations", "", markdown(document(normalize)), ""]
    lines += [markdown(document(normalize.normalize)), "", _names(normalize.NORMALIZATIONS), ""]
    lines += ["## Repairs", "", *_module(repair), markdown(document(repair.repair)), "", *_module(least_squares)]
    return "\n".join(lines)


INTRODUCTION = (
    "Written from the source: what each name stands for, its equation and where it comes from. "
    "[Criteria in use](../concepts/criteria.md) explains how they work together."
)


def _criterion(cls: type[ImportanceCriterion]) -> list[str]:
    needs = sorted({s for v in cls.variants or (None,) for s in cls(v).signals}, key=list(Signal).index)
    roles = "every span" if cls.roles is None else f"the spans with role {', '.join(f'`{r.value}`' for r in cls.roles)}"
    fact = f"Sees {', '.join(f'`{s.value}`' for s in needs)}; scores {'layers' if Signal.STREAM in needs else roles}."
    if cls.variants:
        fact += f" Variants: {_names(cls.variants)} The first is the default."
    return [f"#### {cls.name}", "", markdown(document(cls)), "", f"*{fact}*", ""]


def _module(module: ModuleType) -> list[str]:
    """The docstring of a module under its own first words, equations as they stand."""
    text = document(module)
    title = re.split(r"[:,.\n]", text)[0]
    body = markdown(text.removeprefix(f"{title}.").strip()).replace("```python", "```text")
    return [f"### {title}", "", *([body, ""] if body else [])]


def _names(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names) + "."
