"""Delta weights: weights that are published as the difference from LLaMA's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmpruner import PluginError, UnknownNameError

if TYPE_CHECKING:
    import torch

    from llmpruner import Catalog


class DeltaFamily:
    """Base class of a `ModelFamily` for ``convert --delta``, whose official releases are deltas."""

    def apply_delta(self, base: Path, delta: Path, target: Path, dtype: torch.dtype | None = None) -> None:
        """Write ``base`` plus ``delta`` to ``target`` as a Hugging Face checkpoint.

        Raises `CheckpointError` when ``delta`` is for another base, and writes nothing then.
        """
        raise NotImplementedError


def delta_family(catalog: Catalog, name: str | None) -> DeltaFamily:
    """The family that applies a delta: ``name`` when given, else the only one that defines ``apply_delta`` itself.

    Raises `PluginError` when there is none or several, `UnknownNameError` for another ``name``.
    """
    able = {
        family: cls
        for family, cls in catalog.families.items()
        if issubclass(cls, DeltaFamily) and (name is not None or "apply_delta" in vars(cls))
    }
    if not able:
        raise PluginError("no installed plugin applies delta weights; install one for the family of the delta")
    if name is None and len(able) > 1:
        raise PluginError(f"several families apply delta weights: {', '.join(able)}; choose one with --family")
    chosen = name or next(iter(able))
    if chosen not in able:
        raise UnknownNameError("family with delta weights", chosen, able)
    family: DeltaFamily = able[chosen]()
    return family
