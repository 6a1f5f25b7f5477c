"""Compensation: adapts the weights that read removed units before the cut, without training. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

from ...component import Component
from ...progress import QUIET, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...calibration.calibration import CalibrationSet
    from ...engine.execution import Execution
    from ...engine.journal import Journal
    from ...structure.coupling import CoupledGroup, CouplingGraph
    from ...structure.kept import Kept
    from .choose import Chooser


@dataclass(frozen=True)
class Fit:
    """How one weight was fitted. ``slot``: number of the expert in a stacked parameter, None for one matrix. ``rows``:
    number of tokens in the fit. ``ridge``: λ of `compensation.least_squares` as a share of the mean diagonal
    of the Gram matrix XᵀX; None: weights are unchanged. ``before``, ``after``: squared error of the outputs on tokens
    that are held out, as a share of the mean square of the targets, with the old weights of the inputs that stay and
    with fitted ones; None where it was not computed. ``mix``: the share of the difference of the hidden states in the
    targets, from 0 to 1, where the fit chose it."""

    parameter: str
    slot: int | None
    rows: int
    ridge: float | None
    before: float | None = None
    after: float | None = None
    mix: float | None = None


def fits_record(fits: Sequence[Fit]) -> list[dict[str, Any]]:
    """The fits as JSON values, one for each parameter, as ``llmpruner.json`` keeps them: for a stack of matrices the
    median of the ridges and of the mixes, and errors averaged over the tokens."""
    found: dict[str, list[Fit]] = {}
    for fit in fits:
        found.setdefault(fit.parameter, []).append(fit)
    return [_fit_record(name, of_one) for name, of_one in found.items()]


def _fit_record(parameter: str, fits: Sequence[Fit]) -> dict[str, Any]:
    ridges = [fit.ridge for fit in fits if fit.ridge is not None]
    mixes = [fit.mix for fit in fits if fit.mix is not None]
    known = [(fit.rows, fit.before, fit.after) for fit in fits if fit.before is not None and fit.after is not None]
    rows = sum(count for count, _, _ in known)
    return {
        "parameter": parameter,
        "matrices": len(fits),
        "fitted": len(ridges),
        "rows": sum(fit.rows for fit in fits),
        "ridge": median(ridges) if ridges else None,
        "mix": median(mixes) if mixes else None,
        "before": sum(count * before for count, before, _ in known) / rows if rows else None,
        "after": sum(count * after for count, _, after in known) / rows if rows else None,
    }


@dataclass(frozen=True)
class Repaired:
    """The result. ``kept``: group name → kept units, as planned or as a `Chooser` ranked them again. ``fits``: one for
    each matrix that was fitted or that kept its weights because no fit was better."""

    kept: dict[str, Sequence[int]]
    fits: Sequence[Fit] = ()


@dataclass(frozen=True)
class RepairTask:
    """The inputs of a compensation.

    ``model``: the dense model, changed in place; no shape may change. ``graph``: its coupled groups. ``kept``: group
    name → the units that are kept, in ascending order, for groups that lose units. ``calibration``: token ids, int64 of
    shape (samples, length); None for a compensation that reads no text. ``chooser``: ranks the units of each layer
    again; None when ``kept`` is final. ``execution``: runs the model; None for one in memory. ``journal``: keeps the
    results of finished layers, for a run that is interrupted.
    """

    model: PreTrainedModel
    graph: CouplingGraph
    kept: Kept
    calibration: CalibrationSet | None
    chooser: Chooser | None = None
    progress: Progress = QUIET
    execution: Execution | None = None
    journal: Journal | None = None


class Compensation(Component):
    """Changes the weights that read removed units to keep the outputs of each layer near the dense model's."""

    kind: ClassVar[str] = "compensation"
    reads_text: ClassVar[bool] = True
    """Whether it needs calibration text."""
    by_layer: ClassVar[bool] = False
    """Whether it looks at weights of a layer only inside ``task.execution.weights.layer``, so that the model need not
    be in memory as a whole."""
    ranks_again: ClassVar[bool] = False
    """Whether it uses ``task.chooser``."""
    changes_readers_alone: ClassVar[bool] = False
    """Whether it changes nothing but the weights that read removed units, and their biases, so that ``verify`` can
    compare all other weights with the dense model's."""

    @property
    def weighs_tokens(self) -> bool:
        """Whether it first runs the dense model and a cut one to weigh tokens, which forecasts count."""
        return False

    @property
    def chooses_target(self) -> bool:
        """Whether each fit chooses its target, which forecasts count."""
        return False

    @property
    def holds_out_sources(self) -> bool:
        """Whether fits are judged on one half of the sources of the text in turn, which forecasts count."""
        return False

    def check(self, graph: CouplingGraph, groups: Sequence[CoupledGroup]) -> None:
        """Raise `UnsupportedModelError` where it cannot change the weights that read units of ``groups``, which may
        lose some. Called before text is read; by default nothing is refused."""

    def changed_groups(self, graph: CouplingGraph, kept: Kept) -> Collection[str]:
        """Names of the groups whose readers may change, where ``changes_readers_alone``: those of ``kept``, which lose
        units, unless a compensation changes others too."""
        del graph
        return tuple(kept)

    def repair(self, task: RepairTask) -> Repaired:
        """Change ``task.model`` in place. Called without gradients. The caller removes the units afterwards, with the
        changed weights that read them.

        Raises `UnsupportedModelError` for a decoder that cannot be run as it needs, and `ModelError` for hidden states
        that are not finite.
        """
        raise NotImplementedError
