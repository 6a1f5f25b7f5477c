"""The reference of the Python API, from its functions, its classes, and the settings models."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from docstrings import class_section, document, markdown, signature_of

from llmpruner import api
from llmpruner.discovery.oracle import Verdict
from llmpruner.evaluation.bench import BenchCase, BenchResult, Measurement, ModelSpeed, Rate
from llmpruner.evaluation.evaluate import Evaluation, Evaluations
from llmpruner.models.model import Model, Structure
from llmpruner.pruning.verify import Check, Verification
from llmpruner.recipes.run import RecipeResult, StepResult
from llmpruner.structure.outcome import BudgetOutcome, Outcome, Quality, ScriptTokens, TextTokens, TokenOutcome
from llmpruner.structure.plan import PruningPlan

FUNCTIONS: tuple[Any, ...] = (
    api.load, api.discover, api.verify, api.plan, api.prune, api.prune_each, api.recover, api.evaluate, api.bench,
    api.generate, api.write_report, api.save, api.export, api.verify_checkpoint, api.run_recipe,
)  # fmt: skip
VALUES = (
    Structure,
    Model,
    PruningPlan,
    Outcome,
    BudgetOutcome,
    TokenOutcome,
    Quality,
    ScriptTokens,
    TextTokens,
    Evaluations,
    Evaluation,
    BenchResult,
    BenchCase,
    ModelSpeed,
    Rate,
    Measurement,
    Verdict,
    Verification,
    Check,
    RecipeResult,
    StepResult,
)
_OWN = {
    "progress": "shows what is being done; silent by default",
    "catalog": "the plugins to use; by default everything that is installed",
    "load": "`LoadSettings(dtype=…, device=…)`: how a reference is opened; without effect on a loaded model",
}


def render() -> str:
    lines = [
        "# Python API",
        "",
        INTRODUCTION,
        "",
        "```python",
        EXAMPLE,
        "```",
        "",
        "| function | what it does |",
        "|---|---|",
    ]
    for function in FUNCTIONS:
        first = re.split(r"(?<=[.:])\s", document(function).replace("\n", " "))[0].rstrip(".:")
        lines.append(f"| [`{function.__name__}`](#{function.__name__}) | {markdown(first)} |")
    lines += ["", *_shared()]
    lines += ["", "## Functions"]
    for function in FUNCTIONS:
        lines += _function(function)
    lines += ["", "## Values"]
    for cls in VALUES:
        lines += class_section(cls)
    return "\n".join(lines) + "\n"


INTRODUCTION = (
    "What the command line calls, as functions of the package `llmpruner`. A model is a reference (a directory, a hub "
    "id, a `.gguf` file, `demo`) or the `Model` that `load` returned. Settings are keywords, the same as the options "
    "of the command of the same name; they are typed, so that editors complete and type checkers check them. "
    "[Prune from Python](../how-to/python.md) shows them at work."
)
EXAMPLE = """\
import llmpruner

model = llmpruner.load("demo")
plan = llmpruner.plan(model, ratio=0.2, method="best", settings={"refit": {"mix": 0.3}})
pruned = llmpruner.prune(model, plan=plan, output="pruned")"""


def _shared() -> Iterator[str]:
    yield from ("Keywords that functions share:", "")
    yield from (f"- `{name}`: {text}." for name, text in _OWN.items())


def _function(function: Any) -> Iterator[str]:
    name = function.__name__
    called = signature_of(function, name, _OWN).replace("Source", "str | Path | Model")
    yield from ("", f"### {name}", "", "```python", called, "```", "", markdown(document(function)))
    for parameter in inspect.signature(function).parameters.values():
        found = re.search(r"(\w+)Keywords", str(parameter.annotation))
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and found and found[1] != "Load":
            command = found[1].lower()
            yield from ("", f"`**{parameter.name}`: the options of [`llmpruner {command}`](cli.md#{command}).")
