"""Method: a named set of settings for pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ...component import Component

if TYPE_CHECKING:
    from ...settings import PruneSettings


class Method(Component):
    """Provides defaults for settings that the user does not give."""

    kind: ClassVar[str] = "method"

    def defaults(self, asked: PruneSettings, *, writes: bool) -> Mapping[str, Any]:
        """Field of `PruneSettings` → value. ``asked``: the user's settings; values for fields that it sets are ignored.
        ``writes``: whether the model generates the calibration text, which takes longer than reading it. How much is
        removed (``ratio``, ``target_params`` or ``unit_ratio``) is left to the user; ``compensate``, ``samples`` and
        ``length`` that it leaves open are as for ``--importance`` without a method. A field that does not exist, a
        value that is out of its bounds, or a missing ``importance`` is a `SettingsError`."""
        raise NotImplementedError
