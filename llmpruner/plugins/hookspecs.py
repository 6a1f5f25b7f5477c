"""The hooks of llmpruner: the complete list of what a plugin can add.

A plugin is any installed package with an entry point in the group ``llmpruner`` that names a module (or object)
with functions marked ``@llmpruner.hookimpl``. Hooks return *classes*. Order of installation never matters: names
must be unique, and a clash is an error that names both packages. An exception inside a hook is reported with the
plugin's name, and what that hook would have given is left out; everything else goes on.

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

    from ..checkpoints.reader import CheckpointReader
    from ..families.family import ModelFamily
    from ..importance.base import ImportanceCriterion
    from ..recovery.base import RecoveryStrategy

PROJECT = "llmpruner"
HOOK_VERSION = 1
"""Raised when a plugin that kept to the list above might have to change."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def llmpruner_model_families() -> Sequence[type[ModelFamily]]:
    """Model families: the coupling rules of one architecture each.

    Returns: a list of `ModelFamily` subclasses; an empty list when there is nothing to add. A model is given to
    the one family whose ``matches`` says yes, after families that another match extends are set aside; two left
    is an error that asks for ``--family``.

    Called: once, when a command starts. The classes are created without arguments whenever a model is matched.

    Errors: a family whose groups contradict the model's parameters stops the command with `CouplingError`.
    """
    raise NotImplementedError


@hookspec
def llmpruner_importance_criteria() -> Sequence[type[ImportanceCriterion]]:
    """Importance criteria for ``--importance``.

    Returns: a list of `ImportanceCriterion` subclasses.

    Called: once, when a command starts. A criterion is created when chosen, with the variant that the user asked
    for.

    Errors: a criterion that raises stops the command with its error; one that gives a score which is no finite
    number stops it with `ModelError`.
    """
    raise NotImplementedError


@hookspec
def llmpruner_recovery_strategies() -> Sequence[type[RecoveryStrategy]]:
    """Recovery strategies for ``recover --strategy``.

    Returns: a list of `RecoveryStrategy` subclasses.

    Called: once, when a command starts. A strategy is created without arguments when chosen; settings come with
    the job.

    Errors: a strategy that raises stops the command with its error; what it left in the job's ``work_dir`` stays.
    """
    raise NotImplementedError


@hookspec
def llmpruner_checkpoint_readers() -> Sequence[type[CheckpointReader]]:
    """Readers for checkpoint formats that ``from_pretrained`` does not know (Meta's own, say).

    Returns: a list of `CheckpointReader` subclasses.

    Called: once, when a command starts. Readers are then asked in turn whether they recognise a path.

    Errors: two readers that recognise one path are an error that names both; one that raises stops the command with
    its error.
    """
    raise NotImplementedError


@hookspec
def llmpruner_commands(app: typer.Typer) -> None:
    """Commands for the command line.

    Returns: nothing. ``app`` is an empty Typer application; register commands or groups on it.

    Called: once, when the command line is built.

    Errors: a command whose name exists already is an error that names both packages. Raise
    `llmpruner.LlmprunerError` inside a command for a mistake of the user's: it becomes one line and exit code 2.
    """
    raise NotImplementedError
