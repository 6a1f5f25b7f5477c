"""The application: commands of the core, then those of plugins."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup
from typer.models import CommandInfo, TyperInfo

from .. import __version__
from ..catalog import Catalog
from ..errors import SettingsError, near
from ..plugins.manager import PluginManager
from . import process
from .console import warning_line
from .derive import Command
from .discover import discover
from .measure import bench, evaluate, generate, report
from .plugins import new_plugin, plugins
from .prune import export, plan, prune, recover, verify
from .run import demo, recipes, run

HELP = """
Structural pruning of large language models: smaller, faster, still ordinary models.

The usual order is [bold]discover[/] → [bold]plan[/] → [bold]prune[/] → [bold]recover[/] → [bold]evaluate[/].
MODEL is a directory, a hub id, a .gguf file, or 'demo'. Try `llmpruner demo` first.
"""
COMMANDS = (
    discover, plan, prune, recover, evaluate, bench, generate, export, verify, run, recipes, demo, report, plugins,
    new_plugin,
)  # fmt: skip


def main() -> None:
    """Run the ``llmpruner`` command; ``--debug`` may stand anywhere on its line."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    process.keep_freed_memory()
    process.exit_on_sigterm()
    process.run(lambda: build_app()(args=arguments, prog_name="llmpruner"), arguments, debug=debug)


def build_app(manager: PluginManager | None = None) -> typer.Typer:
    """The Typer application, with the commands of plugins (by default of all that are installed)."""
    manager = manager or PluginManager()
    broken = manager.broken

    class Group(TyperGroup):
        def invoke(self, ctx: Any) -> Any:
            # At the end: a plugin may turn out to be broken when its components are first looked up.
            ctx.call_on_close(lambda: list(map(warning_line, broken)))
            return super().invoke(ctx)

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            if not args[0].startswith("-") and args[0] not in self.commands:
                hint = near(args[0], self.commands)
                raise SettingsError(f"llmpruner has no command '{args[0]}'{hint}; see llmpruner --help")
            return super().resolve_command(ctx, args)

    app = typer.Typer(
        cls=Group, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich", help=HELP
    )

    @app.callback()
    def root(
        ctx: typer.Context,
        version: Annotated[
            bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
        ] = False,
        debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; allowed in any position.")] = False,
    ) -> None:
        ctx.obj = Catalog(manager)

    for command in COMMANDS:
        app.command(cls=Command)(command)
    _add_plugin_commands(app, manager)
    return app


def _version(value: bool) -> None:
    if value:
        typer.echo(f"llmpruner {__version__}")
        raise typer.Exit


def _add_plugin_commands(app: typer.Typer, manager: PluginManager) -> None:
    """Add the commands and groups of plugins, except those whose name exists already."""
    added = typer.Typer()
    manager.call("llmpruner_commands", app=added)
    names = {_name(command) for command in app.registered_commands}
    for command in (*added.registered_commands, *added.registered_groups):
        name = _name(command)
        if name in names:
            manager.broken.append(f"a plugin's command '{name}' was skipped: it exists already")
            continue
        if name is not None:  # the commands of a group without a name are commands of the application
            names.add(name)
        if isinstance(command, TyperInfo):
            app.registered_groups.append(command)
        elif isinstance(command, CommandInfo):
            if command.cls is TyperCommand:
                command.cls = Command
            app.registered_commands.append(command)


def _name(command: Any) -> str | None:
    """As it is typed."""
    if isinstance(command, TyperInfo):  # the name may be that of the group's own Typer
        return typer.main.solve_typer_info_defaults(command).name
    return command.name or typer.main.get_command_name(command.callback.__name__)
