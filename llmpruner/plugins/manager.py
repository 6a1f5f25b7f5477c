"""Loading plugins: the built-in components, then installed packages one by one."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import pluggy

from ..errors import PluginError, first_line
from . import builtin, hookspecs


class PluginManager(pluggy.PluginManager):
    """The built-ins (``builtin``) and, unless switched off, every installed plugin, except those in ``LLMPRUNER_BLOCK``
    (comma-separated). ``broken``: a line for each plugin, and each class of one, that was left out."""

    def __init__(self, *, entry_points: bool = True) -> None:
        super().__init__(hookspecs.PROJECT)
        self.add_hookspecs(hookspecs)
        # By the top-level module that an entry point names. Reading the name of one takes milliseconds.
        self._distributions: dict[str, metadata.Distribution] = {}
        self.broken: list[str] = []
        for name in filter(None, os.environ.get("LLMPRUNER_BLOCK", "").split(",")):
            self.set_blocked(name.strip())
        self.register(builtin, "builtin")
        installed: Iterable[metadata.EntryPoint]
        installed = metadata.entry_points(group=hookspecs.PROJECT) if entry_points else ()
        # pluggy calls the last one first.
        for entry in sorted(sorted(installed, key=lambda e: e.value), key=lambda e: e.name, reverse=True):
            if not self.is_blocked(entry.name):
                self._load(entry)

    def package_of(self, thing: Any) -> str:
        """The distribution of a module, class or function; its top-level module where no entry point names that."""
        module = str(getattr(thing, "__module__", None) or thing.__name__).partition(".")[0]
        distribution = self._distributions.get(module)
        return module if distribution is None else distribution.name

    def call(self, hook: str, **arguments: Any) -> list[Any]:
        """What the implementations of a hook return, in one list, the built-ins' first. Raises `PluginError` where one
        raises."""
        try:
            results = getattr(self.hook, hook)(**arguments)
            return [each for result in results for each in (result if isinstance(result, Iterable) else [result])]
        except Exception as error:
            name, reason = self._raised_by(hook, error), f"{type(error).__name__}: {first_line(error)}"
            raise PluginError(
                f"{hook} of plugin '{name}' failed: {reason}; LLMPRUNER_BLOCK={name} leaves it out"
            ) from error

    def _raised_by(self, hook: str, error: Exception) -> str:
        """The plugin whose implementation of a hook raised ``error``."""
        ran = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
        for implementation in getattr(self.hook, hook).get_hookimpls():
            if getattr(inspect.unwrap(implementation.function), "__code__", None) in ran:
                return str(implementation.plugin_name)
        return "unknown"

    def _load(self, entry: metadata.EntryPoint) -> None:
        """Register the plugin of an entry point; one that is broken is left out, with a line in ``broken``."""
        plugin = None
        # Importing a plugin may raise anything, even SystemExit, which must not end the program.
        try:
            plugin = entry.load()
            self.register(plugin, entry.name)
            self.check_pending()  # raises for a hook that does not exist
            if not self.get_hookcallers(plugin):
                raise PluginError("it has no hook; a function is one if it is marked with @llmpruner.hookimpl")
        except (Exception, SystemExit) as error:
            if plugin is not None and self.is_registered(plugin):
                self.unregister(plugin)
            lines = str(error).splitlines()
            # pluggy names the wrong argument of a hook in the last line.
            reason = lines[-1] if isinstance(error, pluggy.PluginValidationError) and lines else first_line(error)
            reason = f"{type(error).__name__}: {reason}"
            package = entry.dist.name if entry.dist else "unknown package"
            self.broken.append(f"plugin '{entry.name}' ({package}) is broken and was skipped: {reason}")
        else:
            if entry.dist is not None:
                self._distributions[entry.module.partition(".")[0]] = entry.dist
