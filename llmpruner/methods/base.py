"""Method: a named set of settings for a prune."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component

if TYPE_CHECKING:
    from ..settings import PruneSettings


class Method(Component):
    """Fills in what the user left open; whatever the user gives wins over it."""

    kind: ClassVar[str] = "method"

    def defaults(self, asked: PruneSettings, *, writes: bool) -> Mapping[str, Any]:
        """Values by name of `PruneSettings`. ``asked``: what the user gave. ``writes``: whether the model writes the
        calibration text itself, which takes longer than reading it."""
        raise NotImplementedError
