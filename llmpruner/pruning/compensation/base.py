"""Compensation: changes the weights that read removed units before the cut, in closed form, without training.

`Compensation` is the contract; `compensation.builtin` has ``none``, ``bias`` and ``refit``. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...component import Component
from ...errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...calibration.calibration import CalibrationSet
    from ...engine.execution import Execution
    from ...structure.coupling import CoupledGroup, CouplingGraph
    from ...structure.kept import Kept


@dataclass(frozen=True)
class Fit:
    """The fit of one weight. ``slot``: number of the expert in a stacked parameter, None for one matrix. ``rows``:
    number of tokens in the fit. ``ridge``: λ of `compensation.least_squares` as a share of the mean diagonal
    of the Gram matrix XᵀX; None: weights are unchanged. ``before``, ``after``: squared error of the outputs on tokens
    that are held out, as a share of the mean square of the targets, with the old weights of the inputs that stay and
    with fitted ones; None where it was not computed."""

    parameter: str
    slot: int | None
    rows: int
    ridge: float | None
    before: float | None = None
    after: float | None = None


@dataclass(frozen=True)
class RepairTask:
    """The inputs of a compensation.

    ``model``: the dense model, changed in place; no shape may change. ``graph``: its coupled groups. ``kept``: group
    name → the units that are kept, in ascending order, for groups that lose units. ``calibration``: token ids, int64 of
    shape (samples, length); None for a compensation that reads no text. ``execution``: runs the model, shows progress
    and keeps the results of finished layers; None for a model in memory.
    """

    model: PreTrainedModel
    graph: CouplingGraph
    kept: Kept
    calibration: CalibrationSet | None
    execution: Execution | None = None


class Compensation(Component):
    """Changes the weights that read removed units to keep the outputs of each layer near the dense model's."""

    kind: ClassVar[str] = "compensation"
    reads_text: ClassVar[bool] = True
    """Whether it needs calibration text."""
    by_layer: ClassVar[bool] = False
    """Whether it looks at weights of a layer only inside ``task.execution.weights.layer``, so that the model need not
    be in memory as a whole."""
    changes_readers_alone: ClassVar[bool] = False
    """Whether it changes nothing but the weights that read removed units, and their biases, so that ``verify`` can
    compare all other weights with the dense model's."""

    def check(self, graph: CouplingGraph, groups: Sequence[CoupledGroup]) -> None:
        """Raise `UnsupportedModelError` where it cannot change the weights that read units of ``groups``, which may
        lose some. Called before text is read; by default nothing is refused."""

    def repair(self, task: RepairTask) -> Sequence[Fit]:
        """Change ``task.model`` in place, and return the fits: one for each matrix that was fitted, or that kept its
        weights because no fit was better. Called without gradients. The caller removes the units afterwards, with the
        changed weights that read them.

        Raises `UnsupportedModelError` for a decoder that cannot be run as it needs, and `ModelError` for hidden states
        that are not finite.
        """
        raise NotImplementedError


def no_bias(parameter: str) -> UnsupportedModelError:
    """The error for a weight without a bias to change."""
    return UnsupportedModelError(
        f"'{parameter}' has no bias to compensate with; use --set prune.compensate=refit or none"
    )
