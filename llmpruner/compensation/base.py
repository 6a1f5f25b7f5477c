"""Compensation: how weights that read removed units are adapted before the cut, without training. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..component import Component
from ..progress import QUIET, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.calibration import CalibrationSet
    from ..structure.coupling import CouplingGraph
    from ..structure.kept import Kept
    from .choose import Chooser


@dataclass(frozen=True)
class Fit:
    """How one weight was fitted. ``slot``: which expert of a stacked parameter, None for one matrix. ``rows``: rows of
    inputs (tokens) that it was fitted on. ``ridge``: as a share of the mean diagonal of XᵀX; None: left unchanged."""

    parameter: str
    slot: int | None
    rows: int
    ridge: float | None


@dataclass(frozen=True)
class Repaired:
    """The outcome. ``kept``: group name → units that stay, as planned or as a `Chooser` ranked them anew."""

    kept: dict[str, Sequence[int]]
    fits: Sequence[Fit] = ()


@dataclass(frozen=True)
class RepairTask:
    """What a compensation works on.

    ``model``: the dense model, changed in place; no shape may change. ``kept``: group name → units that stay.
    ``calibration``: token ids, None for a compensation that reads no text. ``chooser``: ranks the units of a layer anew
    when the walk comes to it; None when ``kept`` is final.
    """

    model: PreTrainedModel
    graph: CouplingGraph
    kept: Kept
    calibration: CalibrationSet | None
    chooser: Chooser | None = None
    progress: Progress = QUIET


class Compensation(Component):
    """Changes the weights that read removed units so that the outputs of each layer stay near the dense model's."""

    kind: ClassVar[str] = "compensation"
    reads_text: ClassVar[bool] = True
    """Whether it needs calibration text."""
    ranks_again: ClassVar[bool] = False
    """Whether it uses ``task.chooser``."""

    def repair(self, task: RepairTask) -> Repaired:
        """Change ``task.model`` in place. Runs without gradients. The caller cuts afterwards, so what removed units
        contribute through the changed weights is lost."""
        raise NotImplementedError
