"""What the built-in plugins offer for --importance, --method, --compensate and the rest, from their classes."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import Any, get_args

from docstrings import document, markdown
from installed import own_manager
from settings_table import table

from llmpruner import Catalog, Compensation, Method
from llmpruner.catalog import Registry
from llmpruner.component import Component
from llmpruner.engine.signals import Signal
from llmpruner.plugins.installed import KINDS as COMPONENTS
from llmpruner.pruning.allocation import Normalization, normalized
from llmpruner.pruning.compensation import least_squares, repair
from llmpruner.pruning.criteria.base import ImportanceCriterion
from llmpruner.pruning.criteria.estimate import reduce_spans
from llmpruner.settings import PruneSettings, Reduction

CATALOG = Catalog(own_manager())
KINDS = (
    ("method", "Methods", "`--method` fills in what is not given."),
    ("criterion", "Criteria", "`--importance` chooses what a unit's score is computed from."),
    ("reductions", "Reductions", "`--set prune.reduction=…` makes one score of the scores of a unit's spans."),
    ("budget", "Budgets", "`--budget` says what `--ratio` is a share of."),
    ("allocation", "Allocations", "`--set prune.allocation=…` decides how many units each group loses."),
    ("normalizations", "Normalizations", "`--set global.normalize=…` makes scores of different groups comparable."),
    ("compensation", "Compensations", "`--set prune.compensate=…` adapts the weights that consume removed units."),
    ("calibration source", "Calibration sources", "`--calibration` names the text that is measured and fitted on."),
    ("recovery strategy", "Recovery strategies", "`recover --strategy` chooses what is trained."),
    ("metric", "Metrics", "`evaluate` measures `size` always, and the others by their options or `--metrics`."),
    ("exporter", "Exporters", "`export --to` chooses the format."),
    ("runtime", "Runtimes", "`bench --runtime` chooses the program that runs the models."),
)


def criteria() -> dict[ModuleType, list[type[ImportanceCriterion]]]:
    """The built-in criteria by the module that explains their symbols."""
    found: dict[ModuleType, list[type[ImportanceCriterion]]] = {}
    for cls in _own(CATALOG[ImportanceCriterion]):
        found.setdefault(sys.modules[cls.__module__], []).append(cls)
    return found


_NAMES = {cls.__name__: name for base in COMPONENTS.values() for name, cls in CATALOG[base].items()}
"""Class → name, for docstrings that refer to other components."""


def render() -> str:
    lines = ["# Criteria and other components", "", INTRODUCTION, "", "| | |", "|---|---|"]
    for kind, title, _ in KINDS:
        names = LISTED.get(kind) or [cls.name for cls in _own(CATALOG[COMPONENTS[kind]])]
        lines.append(f"| [{title}](#{title.lower().replace(' ', '-')}) | {_names(names)} |")
    for kind, title, text in KINDS:
        lines += ["", f"## {title}", "", text, ""]
        lines += SPECIAL[kind]() if kind in SPECIAL else _components(CATALOG[COMPONENTS[kind]])
    return "\n".join(lines) + "\n"


INTRODUCTION = (
    "What llmpruner itself brings, with equations, sources and settings. A setting is given as "
    "`--set NAME.key=value`, in Python as `settings={NAME: {key: value}}`; some have an option of their own, too. "
    "`llmpruner plugins` lists what other packages add, and `llmpruner plugins NAME` shows the settings of one. "
    "[Importance](../concepts/importance.md), [Allocation](../concepts/allocation.md) and "
    "[Compensation](../concepts/compensation.md) explain how these work together; "
    "[Criteria, measured](../criteria-measured.md) compares criteria with the measured effect of removing units."
)


def _own(registry: Registry[Any]) -> list[type[Component]]:
    return [cls for _, cls in registry.items()]


def _components(registry: Registry[Any]) -> list[str]:
    return [line for cls in _own(registry) for line in _component(cls)]


def _component(cls: type[Component], facts: str = "") -> list[str]:
    """Name, docstring (or summary), facts, and a table of settings."""
    text = re.sub(r"`(\w+)`", lambda found: f"`{_NAMES.get(found[1], found[1])}`", document(cls) or f"{cls.summary}.")
    lines = [f"### {cls.name}", "", markdown(text[0].upper() + text[1:]), ""]
    lines += [f"*{facts}*", ""] if facts else []
    return lines + ([*table(cls.Settings), ""] if cls.Settings.model_fields else [])


def _methods() -> list[str]:
    """What each method fills in when nothing but an amount is given."""
    lines = [
        "| `--method` | criterion | compensation | samples × tokens | where the model writes them |",
        "|---|---|---|---|---|",
    ]
    for cls in _own(CATALOG[Method]):
        read, written = (cls().defaults(PruneSettings(ratio=0.2), writes=writes) for writes in (False, True))
        lines.append(
            f"| `{cls.name}` | `{read['importance']}` | `{read['compensate']}` | {_amount(read)} | {_amount(written)} |"
        )
    return [*lines, "", *_components(CATALOG[Method])]


def _amount(defaults: Any) -> str:
    return f"{defaults['samples']} × {defaults['length']}"


def _criteria() -> list[str]:
    lines: list[str] = []
    for module, classes in criteria().items():
        lines += _module(module)
        for cls in classes:
            lines += [line.replace("### ", "#### ", 1) for line in _component(cls, _facts(cls))]
    return lines


def _facts(cls: type[ImportanceCriterion]) -> str:
    variants = [cls()]
    if "variant" in cls.Settings.model_fields:
        choices = getattr(cls.Settings.model_fields["variant"].annotation, "__args__", ())
        variants = [cls(variant=choice) for choice in choices]
    needs = sorted({signal for one in variants for signal in one.needs}, key=list(Signal).index)
    shown = ", ".join(f"`{signal.value}`" for signal in needs)
    if any(signal in needs for signal in (Signal.STREAM, Signal.STREAM_BLOCKS)):
        return f"Signals: {shown}. Scores layers."
    roles = "every span" if cls.roles is None else f"spans with role {', '.join(f'`{r.value}`' for r in cls.roles)}"
    return f"Signals: {shown}. Scores {roles}."


def _reductions() -> list[str]:
    return [markdown(document(reduce_spans)), "", f"{_names(get_args(Reduction))}.", ""]


def _normalizations() -> list[str]:
    return [markdown(document(normalized)), ""]


def _compensations() -> list[str]:
    return [*_components(CATALOG[Compensation]), *_module(repair), *_module(least_squares)]


LISTED = {"reductions": get_args(Reduction), "normalizations": get_args(Normalization)}
SPECIAL = {
    "method": _methods,
    "criterion": _criteria,
    "reductions": _reductions,
    "normalizations": _normalizations,
    "compensation": _compensations,
}


def _module(module: ModuleType) -> list[str]:
    """The docstring of a module under its own first words, equations as they stand."""
    title, text = re.split(r"[:;,.\n]\s*", document(module), maxsplit=1)
    body = markdown(text[:1].upper() + text[1:]).replace("```python", "```text")
    return [f"### {title}", "", *([body, ""] if body.strip() else [])]


def _names(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)
