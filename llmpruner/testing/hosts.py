"""Plugin hosts for tests, and checks of registered components."""

from __future__ import annotations

from typing import Any

from ..component import Component, ComponentSettings
from ..errors import PluginError, SettingsError
from ..plugins.catalog import KINDS, Kind
from ..plugins.hookspecs import hookimpl
from ..plugins.host import PluginHost, plugin_manager
from ..plugins.registry import Registry, problem_of_name


def host_with(*plugins: Any, entry_points: bool = False) -> PluginHost:
    """A new host with the built-ins and ``plugins``; with ``entry_points`` also all installed plugins.

    A plugin is a module or object with hooks, or a component class: a family, a criterion, a metric … Raises
    `PluginError` for hook functions that this version cannot call.
    """
    host = plugin_manager(entry_points=entry_points)
    names = [getattr(plugin, "__name__", type(plugin).__name__) for plugin in plugins]
    for name, plugin in zip(names, plugins, strict=True):
        host.manager.register(_plugin_with(plugin) if isinstance(plugin, type) else plugin, name)
    for broken in host.broken:
        if broken.name in names:
            raise PluginError(str(broken))
    return host


def _kind_of(cls: type) -> Kind[Any]:
    """The kind of a component class. Raises `TypeError` for any other class."""
    for kind in KINDS.values():
        if issubclass(cls, kind.base):
            return kind
    names = ", ".join(kind.base.__name__ for kind in KINDS.values())
    raise TypeError(f"{cls.__name__} is no plugin; expected a module or object with hooks, or a subclass of {names}")


def _plugin_with(cls: type) -> Any:
    """A plugin with one hook, which returns ``cls``."""
    hook = _kind_of(cls).hook

    def implementation(self: Any) -> list[type]:
        del self
        return [cls]

    implementation.__name__ = hook
    return type(cls.__name__, (), {hook: hookimpl(implementation)})()


def check_registered(registry: Registry[Any], host: PluginHost, cls: type) -> None:
    """Raises `AssertionError` unless ``registry``, of ``host``, contains ``cls`` under its name."""
    name = getattr(cls, "name", "")
    broken = "".join(f"; {plugin}" for plugin in host.broken)
    assert name in registry, (
        f"no installed plugin gives the {registry.kind} '{name}': expected an entry point in the group 'llmpruner' "
        f"that names a module whose {KINDS[registry.kind].hook} returns {cls.__name__}{broken}"
    )
    assert registry[name] is cls, (
        f"the {registry.kind} '{name}' is {registry[name].__qualname__} of {registry.package_of(name)}, "
        f"not {cls.__qualname__} of {cls.__module__}"
    )


def check_named(kind: str, cls: Any) -> None:
    """Raises `AssertionError` unless ``cls`` has a valid name and a summary of one line."""
    problem = problem_of_name(cls)
    assert problem is None, f"{kind} {cls.__name__}: {problem}"
    summary = getattr(cls, "summary", "")
    assert isinstance(summary, str) and summary.strip() and "\n" not in summary, (
        f"{kind} '{cls.name}' has the summary {summary!r}; expected one line"
    )


def check_settings(kind: str, cls: type[Component]) -> None:
    """Raises `AssertionError` unless all settings of ``cls`` have defaults and descriptions, and others are refused."""
    name = cls.name
    assert issubclass(cls.Settings, ComponentSettings), f"{kind} '{name}': Settings must derive from ComponentSettings"
    for key, field in cls.Settings.model_fields.items():
        assert not field.is_required(), f"{kind} '{name}': setting '{key}' has no default"
        assert field.description, f"{kind} '{name}': setting '{key}' has no description"
    try:
        cls(no_such_setting=1)
    except SettingsError:
        return
    raise AssertionError(f"{kind} '{name}' accepts a setting that it does not have")
