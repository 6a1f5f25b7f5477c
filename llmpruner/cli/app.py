"""Building the application: commands of the core, then those of plugins."""

from __future__ import annotations

from typing import Annotated

import typer
import typer.main
from typer.models import CommandInfo, TyperInfo

from .. import __version__
from ..errors import DuplicateNameError
from ..plugins.host import PluginHost, plugin_manager
from . import (
    bench,
    demo,
    discover,
    evaluate,
    export,
    generate,
    new_plugin,
    plugins,
    prune,
    recover,
    report,
    run,
    sensitivity,
    verify,
)
from .console import show_warnings, warning_line

_HOOK = "llmpruner_commands"
HELP = """
Structural pruning of large language models: smaller, faster, still ordinary models.

The usual order is [bold]discover[/] → [bold]plan[/] → [bold]prune[/] → [bold]recover[/] → [bold]evaluate[/].
MODEL is a directory, a hub id, a .gguf file, or 'demo'. Try `llmpruner demo` first.
"""


def build_app(host: PluginHost | None = None) -> typer.Typer:
    """The Typer application over a plugin host (by default: everything installed)."""
    host = host or plugin_manager()
    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        help=HELP,
        add_completion=True,
    )

    @app.callback()
    def root(
        ctx: typer.Context,
        version: Annotated[
            bool,
            typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version),
        ] = False,
        debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; allowed in any position.")] = False,
    ) -> None:
        del version, debug
        from ..plugins.catalog import Catalog  # help is shown without it, and without pydantic

        ctx.obj = Catalog(host)
        show_warnings()
        # Hooks are called when their components are first looked up, so failures are known at the end.
        ctx.call_on_close(lambda: _warn(host))

    for module in (
        demo,
        plugins,
        discover,
        prune,
        recover,
        evaluate,
        sensitivity,
        bench,
        generate,
        export,
        verify,
        run,
        report,
        new_plugin,
    ):
        module.add_commands(app)
    _add_plugin_commands(app, host)
    return app


def _warn(host: PluginHost) -> None:
    for broken in dict.fromkeys(host.broken):
        warning_line(str(broken))


def _version(value: bool) -> None:
    if value:
        typer.echo(f"llmpruner {__version__}")
        raise typer.Exit


def _add_plugin_commands(app: typer.Typer, host: PluginHost) -> None:
    """Add the commands and groups of every plugin. Those that Typer cannot build, or whose name exists already, are
    left out and recorded in ``host.broken``."""
    # Typer's own names, which it would only give after it built every command.
    own_names = (c.name or typer.main.get_command_name(_function(c)) for c in app.registered_commands)
    owner = dict.fromkeys(own_names, "llmpruner")
    for answer in host.call(_HOOK, lambda: {"app": typer.Typer()}, returns=False):
        plugin, own = answer.plugin or answer.wrappers[0], answer.arguments["app"]
        for kind in ("registered_commands", "registered_groups"):
            for command in getattr(own, kind):
                alone = typer.Typer()
                getattr(alone, kind).append(command)
                try:
                    names = _names(alone)
                    for name in names:
                        if name in owner:
                            raise DuplicateNameError(f"command '{name}' exists already in {owner[name]}")
                except Exception as error:  # Typer raises various errors for a function that is no command
                    host.record(plugin, f"{type(error).__name__}: {error}", _HOOK, _function(command))
                    continue
                owner.update(dict.fromkeys(names, host.package_of(plugin)))
                getattr(app, kind).append(command)


def _names(app: typer.Typer) -> list[str]:
    """The names of the commands and groups of an application, as they are typed."""
    return list(typer.main.get_group(app).commands)


def _function(command: CommandInfo | TyperInfo) -> str:
    return getattr(command.callback, "__name__", "a group")
