"""Which options the user gave, and the refusal of those that have no effect beside the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from ..component import Component
from ..errors import SettingsError
from ..plugins.catalog import Registry
from ..settings import Settings, flag_of, option_of

C = TypeVar("C", bound=Component)


class Given:
    """The options that the user gave, of all ``settings``, and a record of the components that they configured.

    ``defaults``: values for settings of components, by the component's name, where the user gave none.
    """

    def __init__(self, settings: Settings, defaults: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.settings = settings
        self.names = {name for name in settings.model_fields_set if getattr(settings, name) is not None}
        self._own: Mapping[str, Mapping[str, Any]] = getattr(settings, "settings", {})
        self._defaults = defaults or {}
        self._used: dict[str, list[str]] = {}

    def has(self, name: str) -> bool:
        return name in self.names

    def flag(self, name: str) -> str:
        return flag_of(type(self.settings), name)

    def refuse(self, name: str, reason: str) -> None:
        """Raise `SettingsError` if the user gave ``name``, which has no effect for ``reason``."""
        if self.has(name):
            flag, negated = self.flag(name), getattr(self.settings, name) is False
            flag = f"--no-{flag[2:]}" if negated and type(self.settings).model_fields[name].default is True else flag
            raise SettingsError(f"{flag} has no effect {reason}; leave it out")

    def create(self, field: str, registry: Registry[C], name: str) -> C:
        """The component ``name``, which ``field`` selects, with the settings of the method and of the user for it."""
        return self.configured(field, registry[name])

    def configured(self, field: str, cls: type[C]) -> C:
        """As `create`, for a class that was found already."""
        values = {**self._defaults.get(cls.name, {}), **self._own.get(cls.name, {})}
        for option, key in self._shorthands(field):
            if key not in cls.Settings.model_fields:
                self.refuse(option, f"with {cls.label()}, which has no setting '{key}'")
            elif self.has(option):
                if key in self._own.get(cls.name, {}):
                    raise SettingsError(f"{self.flag(option)} and --set {cls.name}.{key} give the same; leave one out")
                values[key] = getattr(self.settings, option)
        return self.use(cls(**values))

    def use(self, component: C) -> C:
        """``component``, recorded as one that ``--set`` may configure."""
        self._used.setdefault(component.name, []).append(component.kind)
        return component

    def unused_shorthands(self, field: str, reason: str) -> None:
        """Refuse the shorthand options for settings of the component that ``field`` selects, where there is none."""
        for option, _ in self._shorthands(field):
            self.refuse(option, reason)

    def _shorthands(self, field: str) -> Iterator[tuple[str, str]]:
        for option in type(self.settings).model_fields:
            owner, _, key = (option_of(type(self.settings), option).sets or "").partition(".")
            if owner == field:
                yield option, key

    def check_all_used(self) -> None:
        """Raise for ``--set NAME.key`` of a component that is not chosen."""
        for name in self._own:
            if name not in self._used:
                chosen = ", ".join(f"{kinds[0]} {used}" for used, kinds in self._used.items())
                raise SettingsError(f"--set {name}.… has no effect: '{name}' is not chosen here (chosen: {chosen})")
