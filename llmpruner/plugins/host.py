"""Loading plugins, and recording what is left out of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from textwrap import shorten
from typing import Any

from . import builtin, hookspecs
from .calls import BUILTIN, Answer, HookCalls
from .manager import HookManager

IN_PROCESS = "in-process"
"""Instead of a package, for plugins that a program has registered."""


@dataclass(frozen=True, slots=True)
class BrokenPlugin:
    """What was left out of the plugin ``name``: the class ``item`` that ``hook`` returned; if ``item`` is None, all of
    ``hook``; if ``hook`` is None, the whole plugin."""

    name: str
    package: str
    reason: str
    hook: str | None = None
    item: str | None = None

    def __str__(self) -> str:
        if self.hook is None:
            return f"plugin '{self.name}' ({self.package}) is broken and was skipped: {self.reason}"
        what = f"{self.item} of {self.hook}" if self.item else self.hook
        return f"plugin '{self.name}' ({self.package}): {what} was skipped: {self.reason}"


@dataclass
class PluginHost:
    """A plugin manager, the package of each plugin, and a record of what was left out.

    ``packages``: plugin → distribution, for those that were loaded; a program may register others with ``manager``.
    ``blocked``: the plugins that ``LLMPRUNER_BLOCK`` left out.
    """

    manager: HookManager = field(default_factory=HookManager)
    packages: dict[str, str] = field(default_factory=dict)
    blocked: list[str] = field(default_factory=list)
    _recorded: list[BrokenPlugin] = field(default_factory=list)

    def package_of(self, plugin: str) -> str:
        """The name of the package that ``plugin`` is from."""
        return self.packages.get(plugin, IN_PROCESS)

    def call(
        self, hook: str, arguments: Callable[[], Mapping[str, Any]] = dict, *, returns: bool = True
    ) -> list[Answer]:
        """Call a hook for one plugin after the other: the built-ins first, then by name, each inside all wrappers.

        An implementation or a wrapper that raises, or does not return a list, is left out and recorded in `broken`.
        ``arguments``: returns the arguments of one call. ``returns``: False for a hook without a result.
        """
        calls = HookCalls(self.manager, hook, arguments, returns)
        answers = calls.answers()
        for plugin, reason in calls.failed:
            self.record(plugin, reason, hook)
        return answers

    def record(
        self, plugin: str, reason: str, hook: str | None = None, item: str | None = None, package: str | None = None
    ) -> None:
        """Record what was left out of a plugin; see `BrokenPlugin`."""
        line = shorten(reason, 400, placeholder=" …")
        self._recorded.append(BrokenPlugin(plugin, package or self.package_of(plugin), line, hook, item))

    @property
    def broken(self) -> tuple[BrokenPlugin, ...]:
        """What was left out so far when plugins were loaded and hooks were called, without repetitions."""
        refused = [(self.manager.get_name(plugin), hook, reason) for plugin, hook, reason in self.manager.refused]
        unable = [BrokenPlugin(name, self.package_of(name), reason, hook) for name, hook, reason in refused if name]
        return tuple(dict.fromkeys([*unable, *self._recorded]))


def plugin_manager(*, entry_points: bool = True) -> PluginHost:
    """A fresh host with the built-ins and, unless switched off, every installed plugin.

    ``LLMPRUNER_BLOCK`` (comma-separated plugin names) leaves plugins out, the built-ins too (``builtin``).
    ``LLMPRUNER_TRACE=1`` prints every hook call with its result to standard error. A plugin that cannot be imported is
    recorded in ``broken``.
    """
    host = PluginHost()
    if os.environ.get("LLMPRUNER_TRACE"):
        host.manager.trace.root.setwriter(sys.stderr.write)
        host.manager.enable_tracing()
    for name in {name.strip() for name in os.environ.get("LLMPRUNER_BLOCK", "").split(",")} - {""}:
        host.manager.set_blocked(name)
    host.packages[BUILTIN] = "llmpruner"
    if host.manager.register(builtin, BUILTIN) is None:
        host.blocked.append(BUILTIN)
    if entry_points:
        found = {(e.name, e.dist.name if e.dist else "unknown package", e.value): e for e in _entry_points()}
        for (_, package, _), entry in sorted(found.items()):
            _load(host, entry, package)
    return host


def _entry_points() -> metadata.EntryPoints:
    return metadata.entry_points(group=hookspecs.PROJECT)


def _load(host: PluginHost, entry: metadata.EntryPoint, package: str) -> None:
    if host.manager.is_blocked(entry.name):
        host.blocked.append(entry.name)
        return
    if host.manager.has_plugin(entry.name):
        reason = f"its name is taken by a plugin of {host.package_of(entry.name)}"
        host.record(entry.name, reason, package=package)
        return
    # Imports of plugins may raise anything, including SystemExit, which must not end the application.
    try:
        if host.manager.register(entry.load(), entry.name) is None:
            raise TypeError(f"{entry.value} is None; expected a module or an object with hooks")
    except (Exception, SystemExit) as error:
        host.record(entry.name, f"{type(error).__name__}: {error}", package=package)
    else:
        host.packages[entry.name] = package
