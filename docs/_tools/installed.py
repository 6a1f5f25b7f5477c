"""What ``pip install llmpruner`` gives: the core and its own plugins, whatever else is installed here."""

from __future__ import annotations

from llmpruner.plugins.manager import PluginManager, plugin_manager


def own_manager() -> PluginManager:
    manager = plugin_manager(entry_points=True)
    for name, plugin in manager.list_name_plugin():
        module = plugin.__name__.partition(".")[0] if hasattr(plugin, "__name__") else type(plugin).__module__
        if manager.packages.get(module) != "llmpruner":
            manager.unregister(name=name)
    return manager
