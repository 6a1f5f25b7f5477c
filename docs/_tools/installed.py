"""What ``pip install llmpruner`` gives: the core and its own plugins, whatever else is installed here."""

from __future__ import annotations

from llmpruner import PluginHost, plugin_manager


def own_host() -> PluginHost:
    host = plugin_manager()
    for name, _ in host.manager.list_name_plugin():
        if host.package_of(name) != "llmpruner":
            host.manager.unregister(name=name)
    return host
