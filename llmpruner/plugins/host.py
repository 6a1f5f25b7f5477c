"""A plugin manager with the packages its plugins come from."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from importlib import metadata
from textwrap import shorten
from typing import Any

import pluggy

from . import builtin, hookspecs


@dataclass(frozen=True, slots=True)
class BrokenPlugin:
    """A plugin that was skipped."""

    name: str
    package: str
    reason: str

    def __str__(self) -> str:
        return f"plugin '{self.name}' ({self.package}) is broken and was skipped: {self.reason}"


@dataclass
class PluginHost:
    """A plugin manager with the story of how it was filled."""

    manager: pluggy.PluginManager
    packages: dict[str, str] = field(default_factory=dict)
    """Plugin name → the distribution it comes from."""
    broken: list[BrokenPlugin] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)

    def package_of(self, plugin: str) -> str:
        return self.packages.get(plugin, "in-process")

    def call(self, implementation: pluggy.HookImpl, **arguments: Any) -> Any:
        """Call one plugin's implementation of a hook: one by one, so that a failure has a name."""
        result = implementation.function(**arguments)
        trace = self.manager.trace.root.get("hook")
        trace(f"{implementation.function.__name__} of {implementation.plugin_name} gave {result!r}")
        return result


def plugin_manager(*, entry_points: bool = True) -> PluginHost:
    """A fresh plugin manager with the built-ins and, unless switched off, every installed plugin.

    ``LLMPRUNER_BLOCK`` (comma-separated plugin names) leaves plugins out. ``LLMPRUNER_TRACE=1`` prints every hook
    call to standard error. A plugin that fails to import is recorded in ``broken``, never fatal.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    if os.environ.get("LLMPRUNER_TRACE"):
        manager.trace.root.setwriter(sys.stderr.write)
    host = PluginHost(manager)
    manager.register(builtin, "builtin")
    host.packages["builtin"] = "llmpruner"
    if entry_points:
        blocked = {name.strip() for name in os.environ.get("LLMPRUNER_BLOCK", "").split(",")} - {""}
        for entry in sorted(metadata.entry_points(group=hookspecs.PROJECT), key=lambda e: (e.name, e.value)):
            _load(host, entry, blocked)
    return host


def _load(host: PluginHost, entry: metadata.EntryPoint, blocked: set[str]) -> None:
    package = entry.dist.name if entry.dist else "unknown package"
    if entry.name in blocked:
        host.blocked.append(entry.name)
        return
    if host.manager.has_plugin(entry.name):
        if host.manager.get_plugin(entry.name) is not _loaded(entry):
            other = host.package_of(entry.name)
            host.broken.append(BrokenPlugin(entry.name, package, f"its name is taken by a plugin of {other}"))
        return
    # Whatever a third party's import raises, SystemExit included, must not take the application down.
    try:
        plugin = entry.load()
        host.manager.register(plugin, entry.name)
        host.manager.check_pending()
    except (Exception, SystemExit) as error:
        if host.manager.has_plugin(entry.name):
            host.manager.unregister(name=entry.name)
        reason = shorten(f"{type(error).__name__}: {error}", 400, placeholder=" …")
        host.broken.append(BrokenPlugin(entry.name, package, reason))
    else:
        host.packages[entry.name] = package


def _loaded(entry: metadata.EntryPoint) -> Any:
    """What a second listing of the same entry point refers to (one package seen through two path entries)."""
    return sys.modules.get(entry.module)
