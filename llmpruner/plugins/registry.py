"""Checked classes by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from ..errors import DuplicateNameError, PluginError, UnknownNameError

T = TypeVar("T")


class Registry(Mapping[str, type[T]], Generic[T]):
    """Checked classes by name, with the package each comes from. Looking up an unknown name offers near misses."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[T]] = {}
        self._packages: dict[str, str] = {}

    def add(self, cls: Any, base: type[T], package: str) -> None:
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise PluginError(f"{package} registers {cls!r} as a {self.kind}; expected a subclass of {base.__name__}")
        name = getattr(cls, "name", "")
        if not (isinstance(name, str) and name and name == name.strip().lower()):
            raise PluginError(
                f"{self.kind} {cls.__name__} of {package} has the name {name!r}; expected lower case text"
            )
        if name in self._classes:
            raise DuplicateNameError(
                f"two {self.kind} classes are named '{name}': {self._classes[name].__name__} of "
                f"{self._packages[name]} and {cls.__name__} of {package}; block one with LLMPRUNER_BLOCK"
            )
        self._classes[name] = cls
        self._packages[name] = package

    def package_of(self, name: str) -> str:
        return self._packages[name]

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._classes:
            raise UnknownNameError(self.kind, name, self._classes)
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __iter__(self) -> Any:
        return iter(sorted(self._classes))

    def __len__(self) -> int:
        return len(self._classes)
