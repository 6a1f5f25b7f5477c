"""Budget: what the amount to remove is a share of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component
from ..progress import QUIET, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..structure.architecture import Follows
    from ..structure.coupling import CoupledGroup, CouplingGraph
    from .costs import Cost


@dataclass(frozen=True)
class BudgetSubject:
    """The model whose cost is counted, as it is now. ``groups``: those that may lose units. ``family``: makes what is
    no parameter follow a trial cut."""

    model: PreTrainedModel
    graph: CouplingGraph
    groups: Sequence[CoupledGroup]
    family: Follows
    progress: Progress = QUIET


class Budget(Component):
    """Counts something that a model costs, as a function of how many units each group keeps."""

    kind: ClassVar[str] = "budget"
    from_shapes: ClassVar[bool] = False
    """Whether `cost` needs nothing but shapes, so that a model without weights will do and an amount that cannot be
    reached is refused before weights are read."""

    def check(self, config: PreTrainedConfig) -> None:
        """Raise for settings that the configuration of the model shows to be impossible, before its weights are read.
        Nothing by default."""

    def measure(self, subject: BudgetSubject) -> Mapping[str, Any] | None:
        """JSON values that must be measured on this machine before the cost is known; None when shapes tell it.

        They are recorded in the plan, so that its replay counts the cost without measuring again.
        """
        del subject
        return None

    def cost(self, subject: BudgetSubject, measured: Mapping[str, Any] | None) -> Cost:
        """The cost. ``measured``: what `measure` returned, here or when the plan was made.

        Raises `UnsupportedModelError` where it cannot be known for this model.
        """
        raise NotImplementedError
