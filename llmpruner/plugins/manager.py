"""Loading plugins: the built-in components, then installed packages one by one."""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any

import pluggy

from ..errors import PluginError, first_line
from . import builtin, hookspecs


class PluginManager(pluggy.PluginManager):
    """pluggy's manager with the hooks of llmpruner. ``broken``: a line for each plugin, and each class of one, that was
    left out."""

    def __init__(self) -> None:
        super().__init__(hookspecs.PROJECT)
        self.add_hookspecs(hookspecs)
        # By the top-level module that an entry point names. Reading the name of one takes milliseconds.
        self._distributions: dict[str, metadata.Distribution] = {}
        self.broken: list[str] = []

    def package_of(self, thing: Any) -> str:
        """The distribution of a module, class or function; its top-level module where no entry point names that."""
        module = str(getattr(thing, "__module__", None) or thing.__name__).partition(".")[0]
        distribution = self._distributions.get(module)
        return module if distribution is None else distribution.name

    def call(self, hook: str, **arguments: Any) -> list[Any]:
        """What the implementations of a hook return, in one list. Raises `PluginError` where one raises."""
        results: list[Any] = []
        for implementation in getattr(self.hook, hook).get_hookimpls():
            try:
                results += implementation.function(**arguments) or ()
            except Exception as error:
                name, reason = implementation.plugin_name, f"{type(error).__name__}: {first_line(error)}"
                raise PluginError(
                    f"{hook} of plugin '{name}' failed: {reason}; LLMPRUNER_BLOCK={name} leaves it out"
                ) from error
        return results

    def load(self, entry: metadata.EntryPoint) -> None:
        """Register the plugin of an entry point; one that is broken is left out, with a line in ``broken``."""
        plugin = None
        # Importing a plugin may raise anything, even SystemExit, which must not end the program.
        try:
            plugin = entry.load()
            self.register(plugin, entry.name)
            self.check_pending()  # raises for a hook that does not exist
        except (Exception, SystemExit) as error:
            if plugin is not None and self.is_registered(plugin):
                self.unregister(plugin)
            reason = f"{type(error).__name__}: {first_line(error)}"
            package = entry.dist.name if entry.dist else "unknown package"
            self.broken.append(f"plugin '{entry.name}' ({package}) is broken and was skipped: {reason}")
        else:
            if entry.dist is not None:
                self._distributions[entry.module.partition(".")[0]] = entry.dist


def plugin_manager(*, entry_points: bool = True) -> PluginManager:
    """A new manager with the built-ins (``builtin``) and, unless switched off, every installed plugin, except those in
    ``LLMPRUNER_BLOCK`` (comma-separated)."""
    manager = PluginManager()
    for name in filter(None, os.environ.get("LLMPRUNER_BLOCK", "").split(",")):
        manager.set_blocked(name.strip())
    manager.register(builtin, "builtin")
    if entry_points:
        for entry in sorted(metadata.entry_points(group=hookspecs.PROJECT), key=lambda e: (e.name, e.value)):
            if not manager.is_blocked(entry.name):
                manager.load(entry)
    return manager
