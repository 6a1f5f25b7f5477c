"""The hooks of llmpruner: the complete list of what a plugin can add.

A plugin is any installed package with an entry point in the group ``llmpruner`` that names a module (or object)
with functions marked ``@llmpruner.hookimpl``. Hooks return *classes*, each with a name, a summary, and settings for
``--set NAME.key=value``. A name is lower case, without blanks, commas, dots, colons and equals signs, and unique within
its kind. Every setting has a default, so that the class can be created without arguments. The order of installation has
no effect: two classes of one name are both listed as broken, and selecting that name is an error that names both
packages.

A plugin that cannot be imported is left out. So are single hooks that raise or that this version does not know, and
classes of the wrong kind, with a line on standard error; the command continues. Hooks are called through pluggy, for
one plugin at a time: a wrapper (``@hookimpl(wrapper=True)``) is called around each implementation, and gets and may
change the list with its result. A plugin cannot both implement and wrap a hook.

Packages whose model classes a pruned checkpoint may import, in addition to transformers and the plugins, are named by
entry points in the group ``llmpruner.models``; such a package is imported only when a checkpoint needs it.

Stability: while `HOOK_VERSION` stays the same, everything on this list keeps its name, its arguments and its meaning,
and so do the public names of the classes that hooks return or get. Hooks, methods with a default and fields may be
added without a new version. Removals are announced by a deprecation warning for at least one minor release. Everything
else that is not exported by ``llmpruner`` may change at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer

    from ..calibration.source import CalibrationSource
    from ..discovery.family import ModelFamily
    from ..evaluation.base import Metric
    from ..evaluation.runtime import Runtime
    from ..exporters.base import Exporter
    from ..models.reference import CheckpointReader
    from ..pruning.allocation.base import Allocation
    from ..pruning.budgets.base import Budget
    from ..pruning.compensation.base import Compensation
    from ..pruning.criteria.base import ImportanceCriterion
    from ..pruning.methods.base import Method
    from ..pruning.methods.recipe import NamedRecipe
    from ..recovery.base import RecoveryStrategy
    from ..report.base import ReportSection

PROJECT = "llmpruner"
HOOK_VERSION = 2
"""Increased when plugins may have to change."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def llmpruner_model_families() -> Sequence[type[ModelFamily]]:
    """Model families: the coupled groups of one architecture each.

    Returns: a list of `ModelFamily` subclasses; an empty list when there is nothing to add. The family of a model is
    the one whose ``matches`` returns True and that no other match extends; if there are several, the error asks for
    ``--family``; if there is none, the structure is discovered. Which of two matches is the more specific is known by
    ``extends`` alone, not by what ``matches`` looks at: a family for all models of type ``llama`` that extends
    ``llama`` is beside ``vicuna``, which extends it too, so its ``matches`` must leave out Vicuna; or it extends
    ``vicuna``, and is used for both.

    Called: once, when a command first looks for a family. The classes are created without arguments whenever a model is
    matched.

    Errors: a family whose groups contradict the model's parameters stops the command with `CouplingError`.
    """
    raise NotImplementedError


@hookspec
def llmpruner_importance_criteria() -> Sequence[type[ImportanceCriterion]]:
    """Importance criteria for ``--importance``.

    Returns: a list of `ImportanceCriterion` subclasses.

    Called: once, when a command first looks for a criterion. A criterion is created when chosen, with its settings.

    Errors: a criterion that raises stops the command with its error; scores that are not finite stop it with
    `ModelError`.
    """
    raise NotImplementedError


@hookspec
def llmpruner_allocations() -> Sequence[type[Allocation]]:
    """Allocations for ``--allocation``: how many units each group loses.

    Returns: a list of `Allocation` subclasses.

    Called: once, when a command first looks for an allocation.

    Errors: one that raises stops the command with its error, before anything is written.
    """
    raise NotImplementedError


@hookspec
def llmpruner_budgets() -> Sequence[type[Budget]]:
    """Budgets for ``--budget``: the costs that ``--ratio`` can be a share of.

    Returns: a list of `Budget` subclasses.

    Called: once, when a command first looks for a budget.

    Errors: one that raises stops the command with its error, before calibration text is read or written.
    """
    raise NotImplementedError


@hookspec
def llmpruner_compensations() -> Sequence[type[Compensation]]:
    """Compensations for ``--compensate``: how weights that read removed units are adapted before the cut.

    Returns: a list of `Compensation` subclasses.

    Called: once, when a command first looks for a compensation.

    Errors: one that raises stops the command with its error; nothing is written.
    """
    raise NotImplementedError


@hookspec
def llmpruner_calibration_sources() -> Sequence[type[CalibrationSource]]:
    """Sources for ``--calibration``, which give token sequences.

    Returns: a list of `CalibrationSource` subclasses.

    Called: once, when a command first looks for a source. A part of ``--calibration`` that is no file and equals the
    name of a source, alone or before a colon, selects it; anything else is a file or a data set.

    Errors: one that raises stops the command with its error; one that returns tokens of another shape or dtype than
    int64 (samples, length) stops it with `PluginError`.
    """
    raise NotImplementedError


@hookspec
def llmpruner_recovery_strategies() -> Sequence[type[RecoveryStrategy]]:
    """Recovery strategies for ``recover --strategy``.

    Returns: a list of `RecoveryStrategy` subclasses.

    Called: once, when a command first looks for a strategy. A strategy is created when chosen, with its settings;
    settings that all strategies share are in the job.

    Errors: a strategy that raises stops the command with its error; files in the job's ``work_dir`` are kept.
    """
    raise NotImplementedError


@hookspec
def llmpruner_metrics() -> Sequence[type[Metric]]:
    """Metrics for ``evaluate --metrics``.

    Returns: a list of `Metric` subclasses.

    Called: once, when a command first looks for a metric.

    Errors: one that raises stops the command with its error; one whose result is no mapping of JSON values stops it
    with `PluginError`.
    """
    raise NotImplementedError


@hookspec
def llmpruner_exporters() -> Sequence[type[Exporter]]:
    """Exporters for ``llmpruner export --to``.

    Returns: a list of `Exporter` subclasses.

    Called: once, when a command first looks for an exporter.

    Errors: one that raises stops the command with its error, and its output is removed; one that writes no file stops
    it with `PluginError`.
    """
    raise NotImplementedError


@hookspec
def llmpruner_runtimes() -> Sequence[type[Runtime]]:
    """Programs that run models, for ``llmpruner bench --runtime``.

    Returns: a list of `Runtime` subclasses.

    Called: once, when a command first looks for a runtime.

    Errors: one that raises stops the command with its error.
    """
    raise NotImplementedError


@hookspec
def llmpruner_checkpoint_readers() -> Sequence[type[CheckpointReader]]:
    """Readers for checkpoint formats that ``from_pretrained`` does not support, such as Meta's.

    Returns: a list of `CheckpointReader` subclasses.

    Called: once, when a command first opens a model. ``recognises`` of every reader is then called with its path.

    Errors: two readers that recognise one path are an error that names both; one that raises stops the command with
    its error.
    """
    raise NotImplementedError


@hookspec
def llmpruner_report_sections() -> Sequence[type[ReportSection]]:
    """Sections of HTML pages (``report``, and ``discover --html``).

    Returns: a list of `ReportSection` subclasses.

    Called: once, when a page is made.

    Errors: a section that raises is left out of the page, with a warning that names it; a `SettingsError` stops the
    command.
    """
    raise NotImplementedError


@hookspec
def llmpruner_methods() -> Sequence[type[Method]]:
    """Methods for ``--method``: named sets of settings for pruning.

    Returns: a list of `Method` subclasses.

    Called: once, when a command first looks for a method.

    Errors: a method that returns an unknown setting, or a value out of bounds, stops the command with an error that
    names it.
    """
    raise NotImplementedError


@hookspec
def llmpruner_recipes() -> Sequence[type[NamedRecipe]]:
    """Recipes for ``llmpruner run NAME``: sequences of steps with their settings.

    Returns: a list of `NamedRecipe` subclasses.

    Called: once, when a command first looks for a recipe.

    Errors: a recipe whose text is malformed stops the command with an error that names the line.
    """
    raise NotImplementedError


@hookspec
def llmpruner_commands(app: typer.Typer) -> None:
    """Commands for the command line.

    Returns: nothing. ``app`` is an empty Typer application; register commands or groups on it.

    Called: once, when the command line is built.

    Errors: a command whose name exists already is left out, with a warning that names both packages. Raise
    `llmpruner.LlmprunerError` inside a command for a mistake of the user's: it becomes one line and exit code 2.
    """
    raise NotImplementedError
