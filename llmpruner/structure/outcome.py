"""The size of a model before and after a cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import Any


@dataclass(frozen=True)
class BudgetOutcome:
    """The cost of a model under one budget, in units of ``label``, before and after the cut."""

    name: str
    label: str
    before: float
    after: float

    @property
    def removed(self) -> float:
        """The share that is removed."""
        return 1 - self.after / self.before


@dataclass(frozen=True)
class Outcome:
    """Parameters (tied ones once), those of the decoder's layers, and bytes of the weights: after, in memory, which is
    how they are saved; before, as the files have them where their dtype is smaller than that in memory (float16 on a
    CPU) and the budget is not bytes, else in memory too. ``budget``: set when the plan's budget counts something else.
    ``forecast``: what the run was expected to take, as JSON values; None where nothing was forecast."""

    parameters_before: int
    parameters_after: int
    decoder_before: int
    decoder_after: int
    bytes_before: int
    bytes_after: int
    budget: BudgetOutcome | None = None
    forecast: Mapping[str, Any] | None = None

    @property
    def decoder_removed(self) -> float:
        """The share of the decoder's parameters that is removed."""
        return 1 - self.decoder_after / self.decoder_before

    def as_json(self) -> dict[str, Any]:
        """JSON values, including the removed shares."""
        values: dict[str, Any] = {**asdict(self), "decoder_removed": self.decoder_removed}
        del values["forecast"]
        if self.budget is None:
            del values["budget"]
        else:
            values["budget"]["removed"] = self.budget.removed
        return values

    def _repr_html_(self) -> str:
        """A table for notebooks: before, after, and the removed share."""
        rows = [
            ("decoder parameters", self.decoder_before, self.decoder_after),
            ("all parameters", self.parameters_before, self.parameters_after),
            ("bytes of weights", self.bytes_before, self.bytes_after),
            *([(self.budget.label, self.budget.before, self.budget.after)] if self.budget else []),
        ]
        body = "".join(
            f"<tr><th>{escape(name)}</th><td>{before:,}</td><td>{after:,}</td><td>{1 - after / before:.2%}</td></tr>"
            for name, before, after in rows
        )
        return f"<table><tr><th></th><th>before</th><th>after</th><th>removed</th></tr>{body}</table>"
