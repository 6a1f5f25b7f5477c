"""The hooks of llmpruner: the complete list of what a plugin can add.

A plugin is any installed package with an entry point in the group ``llmpruner`` that names a module (or object)
with functions marked ``@llmpruner.hookimpl``. Hooks return *classes*. Every hook is called once, when a command
starts. Order of installation never matters: names must be unique, and a clash is an error that names both packages.
An exception inside a hook disables that plugin, which is reported by name; the others go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer

    from .checkpoint_readers import CheckpointReader
    from .families import ModelFamily
    from .importance.base import ImportanceCriterion
    from .recovery.base import RecoveryStrategy

PROJECT = "llmpruner"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def llmpruner_model_families() -> Sequence[type[ModelFamily]]:
    """Model families: the coupling rules of one architecture each.

    Return a list of `ModelFamily` subclasses; an empty list when there is nothing to add. A model is given to
    the one family whose ``matches`` says yes, after families that another match extends are set aside; two left
    is an error that asks for ``--family``.
    """
    raise NotImplementedError


@hookspec
def llmpruner_importance_criteria() -> Sequence[type[ImportanceCriterion]]:
    """Importance criteria for ``--importance``.

    Return a list of `ImportanceCriterion` subclasses. They are created when chosen, with the variant that the
    user asked for. A criterion that raises stops the command with its error.
    """
    raise NotImplementedError


@hookspec
def llmpruner_recovery_strategies() -> Sequence[type[RecoveryStrategy]]:
    """Recovery strategies for ``recover --strategy``.

    Return a list of `RecoveryStrategy` subclasses. They are created without arguments when chosen;
    settings come with the job.
    """
    raise NotImplementedError


@hookspec
def llmpruner_checkpoint_readers() -> Sequence[type[CheckpointReader]]:
    """Readers for checkpoint formats that ``from_pretrained`` does not know (Meta's own, say).

    Return a list of `CheckpointReader` subclasses. Readers are asked in turn whether they recognise a path; two
    that do are an error that names both.
    """
    raise NotImplementedError


@hookspec
def llmpruner_commands(app: typer.Typer) -> None:
    """Add commands to the command line.

    ``app`` is the Typer application; register commands on it. A command whose name exists already is an error.
    Raise `llmpruner.LlmprunerError` inside a command for a mistake of the user's.
    """
    raise NotImplementedError
