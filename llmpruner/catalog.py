"""The catalog: the components of all plugins, by base class and name. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from reprlib import repr as short_repr
from typing import Any, Protocol, TypeVar

from .component import Component, check_chosen
from .errors import UnknownNameError

T = TypeVar("T", bound=Component)


class Plugins(Protocol):
    """What a catalog needs of `plugins.manager.PluginManager`."""

    broken: list[str]
    """A line for each plugin, and each class of one, that was left out."""

    def call(self, hook: str) -> list[Any]:
        """What the implementations of a hook return, in one list."""

    def package_of(self, thing: Any) -> str:
        """The distribution of a class."""


class Registry(dict[str, type[T]]):
    """The classes of one kind by name, sorted. Looking up an unknown name raises `UnknownNameError`."""

    def __init__(self, plugins: Plugins, base: type[T]) -> None:
        self.kind, self._plugins = base.kind, plugins
        classes: dict[str, type[T]] = {}
        for cls in plugins.call(base.hook):
            problem = problem_of(cls, base)
            if problem is None and classes.setdefault(cls.name, cls) is not cls:
                other = classes[cls.name]
                problem = f"{other.__name__} of {plugins.package_of(other)} has the name '{cls.name}' already"
            if problem is not None:
                plugins.broken.append(f"{base.hook}: {short_repr(cls)} was skipped: {problem}")
        super().__init__(sorted(classes.items()))

    def __missing__(self, name: str) -> type[T]:
        raise UnknownNameError(self.kind, name, self)

    def package_of(self, name: str) -> str:
        """The distribution of the class ``name``."""
        return self._plugins.package_of(self[name])

    def create(self, name: str, values: Mapping[str, Any] | None = None) -> T:
        """The component ``name`` with the settings ``values``. Raises `UnknownNameError` and `SettingsError`."""
        return self[name](**(values or {}))

    def create_only(self, name: str, settings: Mapping[str, Mapping[str, Any]]) -> T:
        """`create`, for a command that uses one component: ``settings`` (by component name) may be of no other."""
        component = self.create(name, settings.get(name))
        check_chosen(settings, [component])
        return component


class Catalog:
    """The components of all plugins: ``catalog[Budget]["macs"]`` is the class of the budget ``macs``."""

    def __init__(self, plugins: Plugins) -> None:
        self.plugins = plugins
        self._registries: dict[type[Component], Registry[Any]] = {}

    def __getitem__(self, base: type[T]) -> Registry[T]:
        """The classes of the kind that ``base`` begins; its hook is called the first time."""
        if base not in self._registries:
            self._registries[base] = Registry(self.plugins, base)
        return self._registries[base]


def problem_of(cls: Any, base: type) -> str | None:
    """Why ``cls`` cannot be used as a component derived from ``base``; None when it can."""
    if not (isinstance(cls, type) and issubclass(cls, base)):
        return f"it is no subclass of {base.__name__}"
    name: Any = getattr(cls, "name", "")
    # Users write names in lists with commas, as NAME.key=value and as NAME:reference.
    if isinstance(name, str) and name == name.lower() and re.fullmatch(r"[^\s,.=:]+", name):
        return None
    return f"its name is {name!r}; expected lower case text without blanks, commas, dots, colons and equals signs"
