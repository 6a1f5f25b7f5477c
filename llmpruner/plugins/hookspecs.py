"""The hooks of llmpruner: the complete list of what a plugin can add.

A plugin is any installed package with an entry point in the group ``llmpruner`` that names a module (or object)
with functions marked ``@llmpruner.hookimpl``. Hooks return *classes*, each with a name, a summary, and settings that
users reach as ``--set NAME.key=value``. A name is lower case, without blanks, commas, dots, colons and equals signs,
and unique within its kind. Every setting has a default, so that the class can be created without arguments. Order of
installation never matters: two classes of one name are both listed as broken, and choosing that name is an error that
names both packages.

A plugin that cannot be imported is left out. A hook that raises, a class of the wrong kind, or a hook that this
version does not know costs that one thing: a line on standard error names it, and the command goes on. Hooks are
called through pluggy, for one plugin at a time: a wrapper (``@hookimpl(wrapper=True)``) is called around each
implementation, and sees and may change the list that holds its result. It belongs to a plugin that does not implement
the same hook itself.

Packages whose model classes a pruned checkpoint may import, beside transformers and the plugins themselves, are named
by entry points in the group ``llmpruner.models``; such a package is imported only when a checkpoint needs it.

The promise: while `HOOK_VERSION` stays the same, everything on this list keeps its name, its arguments and its
meaning, and so do the public names of the classes that hooks return or are handed. Hooks, methods with a default and
fields may be added without a new version. Whatever is to go is first deprecated, with a warning, for one minor
release at least. Everything else that is not exported by ``llmpruner`` may change at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer

    from ..budgets.base import Budget
    from ..checkpoints.reader import CheckpointReader
    from ..compensation.base import Compensation
    from ..data.source import CalibrationSource
    from ..evaluation.base import Metric
    from ..exporters.base import Exporter
    from ..families.family import ModelFamily
    from ..importance.base import ImportanceCriterion
    from ..methods.base import Method
    from ..recovery.base import RecoveryStrategy
    from ..report.base import ReportSection
    from ..selection.base import Allocation

PROJECT = "llmpruner"
HOOK_VERSION = 2
"""Raised when a plugin that kept to the list above might have to change."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def llmpruner_model_families() -> Sequence[type[ModelFamily]]:
    """Model families: the coupling rules of one architecture each.

    Returns: a list of `ModelFamily` subclasses; an empty list when there is nothing to add. A model is given to
    the one family whose ``matches`` says yes, after families that another match extends are set aside; where none
    matches, structure is discovered; two left is an error that asks for ``--family``.

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

    Errors: a criterion that raises stops the command with its error; one that gives a score which is no finite
    number stops it with `ModelError`.
    """
    raise NotImplementedError


@hookspec
def llmpruner_allocations() -> Sequence[type[Allocation]]:
    """Allocations for ``--allocation``: how many units each group gives up.

    Returns: a list of `Allocation` subclasses.

    Called: once, when a command first looks for an allocation.

    Errors: one that raises stops the command with its error, before anything is written.
    """
    raise NotImplementedError


@hookspec
def llmpruner_budgets() -> Sequence[type[Budget]]:
    """Budgets for ``--budget``: what ``--ratio`` is a share of.

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
    """Sources for ``--calibration``: where token sequences come from.

    Returns: a list of `CalibrationSource` subclasses.

    Called: once, when a command first looks for a source. A part of ``--calibration`` that is no file and equals the
    name of a source, alone or before a colon, chooses it; anything else is a file or a data set.

    Errors: one that raises stops the command with its error.
    """
    raise NotImplementedError


@hookspec
def llmpruner_recovery_strategies() -> Sequence[type[RecoveryStrategy]]:
    """Recovery strategies for ``recover --strategy``.

    Returns: a list of `RecoveryStrategy` subclasses.

    Called: once, when a command first looks for a strategy. A strategy is created when chosen, with its settings;
    settings that all strategies share come with the job.

    Errors: a strategy that raises stops the command with its error; what it left in the job's ``work_dir`` stays.
    """
    raise NotImplementedError


@hookspec
def llmpruner_metrics() -> Sequence[type[Metric]]:
    """Metrics for ``evaluate --metrics``.

    Returns: a list of `Metric` subclasses.

    Called: once, when a command first looks for a metric.

    Errors: one that raises stops the command with its error.
    """
    raise NotImplementedError


@hookspec
def llmpruner_exporters() -> Sequence[type[Exporter]]:
    """Exporters for ``llmpruner export --to``.

    Returns: a list of `Exporter` subclasses.

    Called: once, when a command first looks for an exporter.

    Errors: one that raises stops the command with its error, and what it wrote is removed.
    """
    raise NotImplementedError


@hookspec
def llmpruner_checkpoint_readers() -> Sequence[type[CheckpointReader]]:
    """Readers for checkpoint formats that ``from_pretrained`` does not know (Meta's own, say).

    Returns: a list of `CheckpointReader` subclasses.

    Called: once, when a command first opens a model. Readers are then asked in turn whether they recognise a path.

    Errors: two readers that recognise one path are an error that names both; one that raises stops the command with
    its error.
    """
    raise NotImplementedError


@hookspec
def llmpruner_report_sections() -> Sequence[type[ReportSection]]:
    """Sections of HTML pages (``discover --html``).

    Returns: a list of `ReportSection` subclasses.

    Called: once, when a page is made.

    Errors: a section that raises is left out of the page, with a warning that names it.
    """
    raise NotImplementedError


@hookspec
def llmpruner_methods() -> Sequence[type[Method]]:
    """Methods for ``--method``: named sets of settings for a prune.

    Returns: a list of `Method` subclasses.

    Called: once, when a command first looks for a method.

    Errors: a method that gives an unknown setting, or a value that is out of bounds, is an error that names it.
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
