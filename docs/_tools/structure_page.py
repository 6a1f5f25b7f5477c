"""The reference of structure and signals: spans, groups, layouts, and the signals that criteria get."""

from __future__ import annotations

import inspect
from typing import Any

from docstrings import class_section, document, function_lines, markdown

from llmpruner.engine import signals
from llmpruner.engine.signals import (
    InputStats,
    ParameterSignals,
    Product,
    ProductStats,
    Signal,
    StreamStats,
    TokenStats,
    UnitAxis,
)
from llmpruner.structure import coupling, layouts
from llmpruner.structure.coupling import Blocked, Blocks, CoupledGroup, CouplingGraph, Explicit, Role, Span, index_map

STRUCTURE = (Role, Span, Blocks, Explicit, CoupledGroup, CouplingGraph, Blocked)
SIGNALS = (Signal, ParameterSignals, InputStats, Product, ProductStats, StreamStats, TokenStats, UnitAxis)
CLASSES = (*STRUCTURE, *SIGNALS)
BUILDERS: tuple[Any, ...] = tuple(
    function
    for name, function in vars(layouts).items()
    if inspect.isfunction(function) and function.__module__ == layouts.__name__ and not name.startswith("_")
)
FUNCTIONS = (index_map, *BUILDERS)
KINDS = ("MLP", "ATTENTION", "QUERY", "HIDDEN", "LAYER", "EXPERT", "VOCABULARY", "LATENT")


def render() -> str:
    lines = [
        "# Structure and signals",
        "",
        INTRODUCTION,
        "",
        "## Spans and groups",
        "",
        markdown(document(coupling)),
        "",
    ]
    words = ", ".join(f"`{name}` (`{getattr(coupling, name)!r}`)" for name in KINDS)
    lines += [f"Kinds of units that llmpruner itself knows: {words}. A family may add words of its own.", ""]
    lines += [line for cls in STRUCTURE for line in class_section(cls)]
    lines += ["", "### index_map", "", *function_lines(index_map, "index_map")]
    lines += ["", "## Layouts", "", markdown(document(layouts))]
    for function in BUILDERS:
        lines += ["", f"### layouts.{function.__name__}", "", *function_lines(function, function.__name__)]
    lines += ["", "## Signals", "", markdown(document(signals))]
    lines += [line for cls in SIGNALS for line in class_section(cls)]
    return "\n".join(lines) + "\n"


INTRODUCTION = (
    "For authors of plugins: how a family describes the structure of a model, and what a criterion is shown of it. "
    "[Units and spans](../concepts/units.md) introduces the terms, [the tutorial](../tutorial/index.md) uses them, "
    "and [Hooks](hooks.md) has the classes that a plugin gives. Whatever a plugin needs is imported from `llmpruner`."
)
