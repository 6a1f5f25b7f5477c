"""What a cut leaves of a model, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class BudgetOutcome:
    """What the plan's budget counts, before and after, in units of its label."""

    name: str
    label: str
    before: float
    after: float

    @property
    def removed(self) -> float:
        """The share that goes."""
        return 1 - self.after / self.before


@dataclass(frozen=True)
class Outcome:
    """Parameters (tied ones once), those of the decoder's layers, and bytes of the weights in memory. ``budget``: where
    it counts something else."""

    parameters_before: int
    parameters_after: int
    decoder_before: int
    decoder_after: int
    bytes_before: int
    bytes_after: int
    budget: BudgetOutcome | None = None

    @property
    def decoder_removed(self) -> float:
        """The share of the decoder's parameters that goes."""
        return 1 - self.decoder_after / self.decoder_before

    def as_json(self) -> dict[str, Any]:
        """JSON values, with the shares that are removed."""
        values: dict[str, Any] = {**asdict(self), "decoder_removed": self.decoder_removed}
        if self.budget is None:
            del values["budget"]
        else:
            values["budget"]["removed"] = self.budget.removed
        return values
