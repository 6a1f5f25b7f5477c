"""Plugin managers for tests: with given plugins, and what an entry point must have brought."""

from __future__ import annotations

from typing import Any

from ..checkpoints.reader import CheckpointReader
from ..component import Component, ComponentSettings
from ..errors import SettingsError
from ..families.family import ModelFamily
from ..importance.base import ImportanceCriterion
from ..plugins.hookspecs import hookimpl
from ..plugins.host import PluginHost, plugin_manager
from ..plugins.registry import Registry
from ..recovery.base import RecoveryStrategy

_HOOKS: dict[type, str] = {
    ModelFamily: "llmpruner_model_families",
    ImportanceCriterion: "llmpruner_importance_criteria",
    RecoveryStrategy: "llmpruner_recovery_strategies",
    CheckpointReader: "llmpruner_checkpoint_readers",
}


def host_with(*plugins: Any, entry_points: bool = False) -> PluginHost:
    """A fresh host with the built-ins and ``plugins``; with ``entry_points`` also everything installed.

    A plugin is a module or object with hooks, or simply a family, criterion, strategy or reader class. Raises pluggy's
    `PluginValidationError` for a hook that llmpruner does not have.
    """
    host = plugin_manager(entry_points=entry_points)
    for plugin in plugins:
        name = getattr(plugin, "__name__", type(plugin).__name__)
        host.manager.register(_giving(plugin) if isinstance(plugin, type) else plugin, name)
    host.manager.check_pending()
    return host


def _giving(cls: type) -> Any:
    """A plugin whose one hook returns ``cls``."""
    hook = next((hook for base, hook in _HOOKS.items() if issubclass(cls, base)), None)
    if hook is None:
        names = ", ".join(base.__name__ for base in _HOOKS)
        raise TypeError(
            f"{cls.__name__} is no plugin; expected a module or object with hooks, or a subclass of {names}"
        )

    def give(self: Any) -> list[type]:
        del self
        return [cls]

    give.__name__ = hook
    return type(cls.__name__, (), {hook: hookimpl(give)})()


def check_registered(registry: Registry[Any], host: PluginHost, cls: type) -> None:
    """Raises `AssertionError` unless a plugin of ``host`` gives ``cls`` under its name."""
    name = getattr(cls, "name", "")
    hook = next(hook for base, hook in _HOOKS.items() if issubclass(cls, base))
    broken = "".join(f"; {plugin}" for plugin in host.broken)
    assert name in registry, (
        f"no installed plugin gives the {registry.kind} '{name}': expected an entry point in the group 'llmpruner' "
        f"that names a module whose {hook} returns {cls.__name__}{broken}"
    )
    assert registry[name] is cls, (
        f"the {registry.kind} '{name}' is {registry[name].__qualname__} of {registry.package_of(name)}, "
        f"not {cls.__qualname__} of {cls.__module__}"
    )


def check_named(kind: str, cls: Any) -> None:
    """Raises `AssertionError` unless ``cls`` says in words that fit a table what it is."""
    name, summary = getattr(cls, "name", ""), getattr(cls, "summary", "")
    assert isinstance(name, str) and name and name == name.lower() and not set(name) & set(" \t\n,"), (
        f"{kind} {cls.__name__} has the name {name!r}; expected lower case text without blanks and commas"
    )
    assert isinstance(summary, str) and summary.strip() and "\n" not in summary, (
        f"{kind} '{name}' has the summary {summary!r}; expected one line that says what it does"
    )


def check_settings(kind: str, cls: type[Component]) -> None:
    """Raises `AssertionError` unless the settings of ``cls`` have defaults and descriptions and take nothing else."""
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
