"""Component: the base class of everything that hooks return. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from .errors import SettingsError
from .values import validated


class ComponentSettings(BaseModel):
    """Base class of a component's settings: fields with types, and ``Field(default, description=…)`` with bounds. They
    are set by ``--set NAME.key=value`` or by keywords in Python, and recorded in plans and job records."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Component:
    """A class with a name, a one-line summary, and settings; `ImportanceCriterion` has a complete example. An instance
    is created from settings, as keywords or as an instance of ``Settings``, and keeps no other state between calls."""

    kind: ClassVar[str] = "component"
    """The kind in messages: "criterion", "budget" …; set by the base class of each kind."""
    hook: ClassVar[str] = ""
    """The hook of `plugins.hookspecs` that returns classes of this kind; set with ``kind``."""
    name: ClassVar[str] = ""
    """Unique among components of its kind, over all plugins; lower case, no blanks."""
    summary: ClassVar[str] = ""
    """One line for ``llmpruner plugins``."""
    Settings: ClassVar[type[ComponentSettings]] = ComponentSettings

    def __init__(self, settings: ComponentSettings | None = None, /, **values: Any) -> None:
        """Raises `SettingsError` for a key that ``Settings`` does not have, or a value that is invalid for it."""
        self.settings = settings if settings is not None else validated(self.Settings, values, self.label())

    @classmethod
    def label(cls) -> str:
        """``criterion taylor``, as messages name it."""
        return f"{cls.kind} {cls.name}"

    def record(self) -> dict[str, Any]:
        """The settings as JSON values, as plans and job records keep them."""
        return self.settings.model_dump(mode="json")


def check_chosen(values: Mapping[str, Any], components: Iterable[Component]) -> None:
    """Raise `SettingsError` for ``--set NAME.key`` of a component that is not used. ``values``: by component."""
    chosen = {component.name: component.kind for component in components}
    for name in values:
        if name not in chosen:
            used = ", ".join(f"{kind} {other}" for other, kind in chosen.items() if other)
            raise SettingsError(f"--set {name}.…: '{name}' is not chosen here (chosen: {used})")
