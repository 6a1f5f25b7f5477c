"""The hooks of llmpruner: the complete list of what a plugin can add.

A plugin is an installed package with an entry point in the group ``llmpruner``, which names a module (or object) with
functions marked ``@llmpruner.hookimpl``. Hooks return lists of *classes*, each with a name, a summary, and settings for
``--set NAME.key=value``, all of which have defaults. A name is lower case, without blanks, commas, dots, colons and
equals signs, and unique within its kind.

Hooks are called when a command first needs classes of their kind. A plugin that cannot be imported, or has no hook or
an unknown one, is left out with a line on standard error, and so is a class of the wrong kind, or with a name that is
taken. A component that raises stops the command; nothing is written.

An entry point in the group ``llmpruner.models`` names a package whose model classes pruned checkpoints may import,
besides transformers and the plugins. It is imported only when a checkpoint needs it.
"""

# mypy: disable-error-code="empty-body"

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer

    from ..calibration.base import CalibrationSource
    from ..evaluation.bench import Runtime
    from ..evaluation.evaluate import Metric
    from ..exporters import Exporter
    from ..models.family import ModelFamily
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

    The family of a model is the one whose ``matches`` returns True and that no other match ``extends``; if there are
    several, the user must choose by ``--family``; if there is none, the structure is discovered.
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
    """Sources for ``--calibration``, which return int64 tokens (samples, length).

    ``NAME`` and ``NAME:argument`` select the source of that name; anything else, and a file of such a name, is text.
    """


@hookspec
def llmpruner_recovery_strategies() -> Sequence[type[RecoveryStrategy]]:
    """Recovery strategies for ``recover --strategy``. When one raises, files in the job's ``work_dir`` are kept."""


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

    No two may recognise the same path.
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

    Called at every start, so import what is slow inside the commands. A command whose name is taken is left out, with a
    warning. Raise `llmpruner.LlmprunerError` for a user's mistake: it becomes one line, and exit code 2.
    """
