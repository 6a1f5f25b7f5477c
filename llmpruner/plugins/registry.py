"""The checked classes of one kind, by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import Any, Generic, TypeVar

from ..component import ComponentSettings
from ..discovery.family import ModelFamily
from ..errors import DuplicateNameError, UnknownNameError

T = TypeVar("T")


@dataclass(frozen=True)
class Registered(Generic[T]):
    """A class, its plugin, and the package of the plugin."""

    cls: type[T]
    plugin: str
    package: str


class Registry(Mapping[str, type[T]], Generic[T]):
    """Classes by name, in the order of their names.

    Looking up an unknown name raises `UnknownNameError`. A name of several classes is ``in`` the registry but left out
    of iteration; looking it up raises `DuplicateNameError`.
    """

    def __init__(self, kind: str, base: type[T]) -> None:
        self.kind = kind
        self.base = base
        self._found: dict[str, list[Registered[T]]] = {}

    def add(self, cls: type[T], plugin: str, package: str) -> None:
        """Add a class that `problem_of` accepts; a class that several plugins return is added once."""
        entries = self._found.setdefault(name_of(cls), [])
        if all(entry.cls is not cls for entry in entries):
            entries.append(Registered(cls, plugin, package))

    def duplicates(self) -> Iterator[tuple[Registered[T], str]]:
        """Every class that shares its name with another, and the error message."""
        for name, entries in sorted(self._found.items()):
            if len(entries) > 1:
                yield from ((entry, self._duplicate(name)) for entry in entries)

    def _duplicate(self, name: str) -> str:
        classes = " and ".join(f"{entry.cls.__name__} of {entry.package}" for entry in self._found[name])
        count = {2: "two"}.get(len(self._found[name]), "several")
        return f"{count} {self.kind} classes are named '{name}': {classes}; block one with LLMPRUNER_BLOCK"

    def _entry(self, name: str) -> Registered[T]:
        if name not in self._found:
            raise UnknownNameError(self.kind, name, self)
        if len(self._found[name]) > 1:
            raise DuplicateNameError(self._duplicate(name))
        return self._found[name][0]

    def plugin_of(self, name: str) -> str:
        return self._entry(name).plugin

    def package_of(self, name: str) -> str:
        return self._entry(name).package

    def __getitem__(self, name: str) -> type[T]:
        return self._entry(name).cls

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return (name for name, entries in sorted(self._found.items()) if len(entries) == 1)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def name_of(cls: Any) -> str:
    """The name of a component class; empty where it has none."""
    name = getattr(cls, "name", "")
    return name if isinstance(name, str) else ""


def problem_of_name(cls: Any) -> str | None:
    """Why the name of a component class is invalid, None when it is valid: users write names in lists with commas, as
    ``NAME.key=value`` and as ``NAME:reference``."""
    name = getattr(cls, "name", "")
    if isinstance(name, str) and name == name.lower() and re.fullmatch(r"[^\s,.=:]+", name):
        return None
    return f"it has the name {name!r}; expected lower case text without blanks, commas, dots, colons and equals signs"


def problem_of_types(cls: type[ModelFamily]) -> str | None:
    """Why ``model_types`` or ``extends`` of a family is invalid, None when both are valid. A text instead of a tuple
    would match every model type that is a part of it."""
    types: Any = cls.model_types
    if isinstance(types, str):
        return f"model_types is the text {types!r}; expected a tuple: ({types!r},)"
    if not (isinstance(types, (tuple, list, set, frozenset)) and all(isinstance(one, str) for one in types)):
        return f"model_types is {short_repr(types)}; expected a tuple of texts"
    extends: Any = cls.extends
    if not (extends is None or isinstance(extends, str)):
        return f"extends is {short_repr(extends)}; expected the name of a family, or None"
    return None


def problem_of(cls: Any, base: type) -> str | None:
    """Why ``cls`` cannot be used as a component of the kind of ``base``; None when it can."""
    if not (isinstance(cls, type) and issubclass(cls, base)):
        return f"{short_repr(cls)} is no subclass of {base.__name__}"
    wrong = problem_of_name(cls) or (problem_of_types(cls) if issubclass(cls, ModelFamily) else None)
    if wrong:
        return wrong
    settings = getattr(cls, "Settings", ComponentSettings)
    if not (isinstance(settings, type) and issubclass(settings, ComponentSettings)):
        return "its Settings is no subclass of ComponentSettings"
    required = [key for key, field in settings.model_fields.items() if field.is_required()]
    if required:
        return f"its setting '{required[0]}' has no default; every setting needs one"
    # Third-party code may raise anything.
    try:
        cls()
    except (Exception, SystemExit) as error:
        return f"it cannot be created without arguments: {type(error).__name__}: {error}"
    return None
