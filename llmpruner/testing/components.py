"""Catalogs for tests, and what every component must have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal, TypeVar, get_args, get_origin

from ..catalog import Catalog, problem_of
from ..component import Component, ComponentSettings
from ..plugins.hookspecs import hookimpl
from ..plugins.installed import KINDS, load_catalog
from ..plugins.manager import PluginManager

C = TypeVar("C", bound=Component)


def catalog_with(*plugins: Any, entry_points: bool = False) -> Catalog:
    """A catalog of the built-ins and ``plugins`` (modules, objects with hooks, component classes) or installed ones."""
    manager = PluginManager(entry_points=entry_points)
    for plugin in plugins:
        manager.register(_plugin_with(plugin) if isinstance(plugin, type) else plugin)
    manager.check_pending()
    return Catalog(manager)


def _plugin_with(cls: type) -> Any:
    """A plugin with one hook, which returns ``cls``."""
    for base in KINDS.values():
        if issubclass(cls, base):
            return SimpleNamespace(**{base.hook: hookimpl(lambda: [cls])})
    raise TypeError(f"{cls.__name__} is no plugin; expected a module or object with hooks, or a component class")


def check_component(kind: str, cls: type[Component]) -> None:
    """An installed plugin registers ``cls``; it has a name, a summary of one line, and documented settings."""
    base = KINDS[kind]
    problem = problem_of(cls, base)
    assert problem is None, f"{kind} {cls.__name__}: {problem}"
    name, catalog = cls.name, load_catalog()
    registered = catalog[base].get(name)
    broken = "".join(f"; {line}" for line in catalog.plugins.broken)
    assert registered is cls, (
        f"no installed plugin has this {kind} '{name}': expected an entry point in the group 'llmpruner' that names a "
        f"module whose {base.hook} returns {cls.__name__}{broken}"
    )
    one_line = cls.summary.strip() and "\n" not in cls.summary
    assert one_line, f"{kind} '{name}' has the summary {cls.summary!r}; expected one line"
    assert issubclass(cls.Settings, ComponentSettings), f"{kind} '{name}': Settings must derive from ComponentSettings"
    for key, field in cls.Settings.model_fields.items():
        assert not field.is_required(), f"{kind} '{name}': setting '{key}' has no default"
        assert field.description, f"{kind} '{name}': setting '{key}' has no description"


def settings_grid(cls: type[C]) -> list[C]:
    """Instances of ``cls``: with its defaults, and with each other value of a `Literal` or `bool` setting."""
    grid = [cls()]
    for key, field in cls.Settings.model_fields.items():
        choices: tuple[Any, ...] = (False, True) if field.annotation is bool else ()
        if get_origin(field.annotation) is Literal:
            choices = get_args(field.annotation)
        grid += [cls(**{key: value}) for value in choices if value != field.default]
    return grid


def label(component: Component) -> str:
    """The name of a component with its settings, for messages."""
    values = ", ".join(f"{key}={value}" for key, value in component.record().items())
    return f"{component.kind} '{component.name}'" + (f" ({values})" if values else "")
