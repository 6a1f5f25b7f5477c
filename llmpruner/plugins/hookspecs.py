"""The hooks of llmpruner: the complete list of what a plugin can add.

A plugin is an installed package with an entry point in the group ``llmpruner`` that names a module (or object) with
functions marked ``@llmpruner.hookimpl``; what these need is imported from ``llmpruner``. Hooks return lists of
*classes*, each with a name, a summary, and settings for ``--set NAME.key=value``, all of which have defaults. A name is
lower case, without blanks, commas, dots, colons and equals signs, and unique within its kind.

Hooks are called when a command first needs classes of their kind. A plugin that cannot be imported, or has a hook that
does not exist, is left out with a line on standard error, and so is a class of the wrong kind, or with a name that is
taken. A component that raises stops the command; nothing is written.

Packages whose model classes a pruned checkpoint may import, in addition to transformers and the plugins, are named by
entry points in the group ``llmpruner.models``; such a package is imported only when a checkpoint needs it.
"""

# mypy: disable-error-code="empty-body"

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer

    from ..calibration.calibration import CalibrationSource
    from ..discovery.family import ModelFamily
    from ..evaluation.bench import Runtime
    from ..evaluation.evaluate import Metric
    from ..exporters import Exporter
    from ..models.reference import CheckpointReader
    from ..pruning.allocation import Allocation
    from ..pruning.budgets import Budget
    from ..pruning.compensation.base import Compensation
    from ..pruning.criteria.base import ImportanceCriterion
    from ..pruning.methods import Method
    from ..recipes import NamedRecipe
    from ..recovery.base import RecoveryStrategy
    from ..report.base import ReportSection

PROJECT = "llmpruner"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def llmpruner_model_families() -> Sequence[type[ModelFamily]]:
    """Model families: the coupled groups of one architecture each.

    The family of a model is the one whose ``matches`` returns True and that no other match ``extends``; several are an
    error that asks for ``--family``, and without any the structure is discovered. Groups that contradict the model's
    parameters stop the command with `CouplingError`.
    """


@hookspec
def llmpruner_importance_criteria() -> Sequence[type[ImportanceCriterion]]:
    """Importance criteria for ``--importance``. Scores that are not finite stop the command with `ModelError`."""


@hookspec
def llmpruner_allocations() -> Sequence[type[Allocation]]:
    """Allocations for ``--set prune.allocation=…``: how many units each group loses."""


@hookspec
def llmpruner_budgets() -> Sequence[type[Budget]]:
    """Budgets for ``--budget``: the costs that ``--ratio`` can be a share of."""


@hookspec
def llmpruner_compensations() -> Sequence[type[Compensation]]:
    """Compensations for ``--set prune.compensate=…``: how weights that read removed units are adapted."""


@hookspec
def llmpruner_calibration_sources() -> Sequence[type[CalibrationSource]]:
    """Sources for ``--calibration``, which return token sequences.

    A part of ``--calibration`` that is no file and equals the name of a source, by itself or before a colon, selects
    it; anything else is a file or a data set. Tokens of another shape or dtype than int64 (samples, length) stop the
    command with `PluginError`.
    """


@hookspec
def llmpruner_recovery_strategies() -> Sequence[type[RecoveryStrategy]]:
    """Recovery strategies for ``recover --strategy``.

    Settings that all strategies share are in the job; when one raises, files in the job's ``work_dir`` are kept.
    """


@hookspec
def llmpruner_metrics() -> Sequence[type[Metric]]:
    """Metrics for ``evaluate --metrics``."""


@hookspec
def llmpruner_exporters() -> Sequence[type[Exporter]]:
    """Exporters for ``llmpruner export --to``. The output of one that raises is removed."""


@hookspec
def llmpruner_runtimes() -> Sequence[type[Runtime]]:
    """Programs that run models, for ``llmpruner bench --runtime``."""


@hookspec
def llmpruner_checkpoint_readers() -> Sequence[type[CheckpointReader]]:
    """Readers for checkpoint formats that ``from_pretrained`` does not support, such as Meta's.

    ``recognises`` of every reader is called with the path of each model that is opened; two that recognise it are an
    error that names both.
    """


@hookspec
def llmpruner_report_sections() -> Sequence[type[ReportSection]]:
    """Sections of the HTML page of ``report``. One that raises is left out of the page, with a warning."""


@hookspec
def llmpruner_methods() -> Sequence[type[Method]]:
    """Methods for ``--method``: named sets of settings for pruning."""


@hookspec
def llmpruner_recipes() -> Sequence[type[NamedRecipe]]:
    """Recipes for ``llmpruner run NAME``: sequences of steps with their settings."""


@hookspec
def llmpruner_commands(app: typer.Typer) -> None:
    """Commands for the command line: register commands or groups on ``app``, an empty Typer application.

    Called at every start, so import what is slow inside the commands. A command whose name exists already is left out,
    with a warning. Raise `llmpruner.LlmprunerError` inside a command for a mistake of the user's: it becomes one line
    and exit code 2.
    """
