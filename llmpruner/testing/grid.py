"""Instances of a component for every value of its settings of type `Literal` or `bool`."""

from __future__ import annotations

from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from ..component import Component

C = TypeVar("C", bound=Component)


def settings_grid(cls: type[C]) -> list[C]:
    """Instances of ``cls``: with its defaults, and with each other value of each setting of type `Literal` or `bool`,
    one at a time."""
    grid = [cls()]
    for key, field in cls.Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        grid += [cls(**{key: value}) for value in _values(field.annotation) if value != default]
    return grid


def _values(annotation: Any) -> tuple[Any, ...]:
    if annotation is bool:
        return (False, True)
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return tuple(value for part in get_args(annotation) for value in _values(part))
    return ()


def changed(component: Component) -> str:
    """The settings that differ from their defaults, as ``key=value, key=value``."""
    defaults = type(component).Settings().model_dump()
    values = component.settings.model_dump()
    return ", ".join(f"{key}={value}" for key, value in values.items() if value != defaults.get(key))
