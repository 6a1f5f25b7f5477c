"""Budget: a cost of a model that the amount to remove can be a share of."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...component import Component
from ...progress import QUIET, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ...structure.architecture import Follows
    from ...structure.coupling import CoupledGroup, CouplingGraph
    from .costs import Cost


@dataclass(frozen=True)
class BudgetSubject:
    """The model whose cost is counted. ``model``: with its weights, or on the meta device where `Budget.from_shapes`.
    ``graph``: its coupled groups, of which ``groups`` may lose units. ``family``: for trial cuts, updates the
    attributes of modules."""

    model: PreTrainedModel
    graph: CouplingGraph
    groups: Sequence[CoupledGroup]
    family: Follows
    progress: Progress = QUIET


class Budget(Component):
    """Counts a cost of a model as a function of the number of units that each group keeps."""

    kind: ClassVar[str] = "budget"
    from_shapes: ClassVar[bool] = False
    """Whether `cost` reads shapes alone, so that it works for a model on the meta device and an amount that cannot be
    reached is refused before weights are read."""

    def check(self, config: PreTrainedConfig) -> None:
        """Raise for settings that the configuration of the model shows to be impossible, before its weights are read.
        Nothing by default."""

    def check_kinds(self, kinds: Collection[str]) -> None:
        """Raise `SelectionError` where units of these kinds save nothing of it in any model, before weights are read.
        Nothing by default; what depends on the model is refused later, by its cost."""

    def measure(self, subject: BudgetSubject) -> Mapping[str, Any] | None:
        """JSON values measured on this machine that `cost` needs; None when it needs none.

        They are recorded in the plan, so that replaying it does not measure again.
        """
        del subject
        return None

    def cost(self, subject: BudgetSubject, measured: Mapping[str, Any] | None) -> Cost:
        """The cost, whose unit `Cost.unit` names. ``measured``: the result of `measure`, now or when the plan was made.

        Raises `UnsupportedModelError` where it cannot be known for this model.
        """
        raise NotImplementedError
