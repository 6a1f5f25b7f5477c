"""What ``pip install llmpruner`` gives: the core and its own plugins, whatever else is installed here."""

from __future__ import annotations

from llmpruner.plugins.manager import PluginManager


def own_manager() -> PluginManager:
    manager = PluginManager()
    for name, plugin in manager.list_name_plugin():
        if manager.package_of(plugin) != "llmpruner":
            manager.unregister(name=name)
    return manager
