"""The budget of time per decoded token. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from ...component import ComponentSettings
from ...errors import PlanError
from .base import Budget, BudgetSubject
from .costs import Cost

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Latency(Budget):
    """Milliseconds to decode one token while ``context`` tokens are in the cache, measured on this machine for the
    whole model and with fewer units of each kind of group."""

    name = "latency"
    summary = "milliseconds per decoded token, measured on this machine"

    class Settings(ComponentSettings):
        context: int = Field(512, ge=1, description="Tokens in the key/value cache.")

    settings: Settings

    def check(self, config: PreTrainedConfig) -> None:
        """Raises `SelectionError` for a context that the model cannot read."""
        from .timing import check_context

        check_context(config, self.settings.context)

    def measure(self, subject: BudgetSubject) -> Mapping[str, Any]:
        """A `LatencyTable` as JSON values. Raises `SelectionError` for a context that the model cannot read, and
        `UnsupportedModelError` when its layers cannot be timed one by one."""
        from .timing import measure_latency

        return measure_latency(subject, self.settings.context).model_dump(mode="json")

    def cost(self, subject: BudgetSubject, measured: Mapping[str, Any] | None) -> Cost:
        """``measured``: a `LatencyTable` as JSON values. Raises `PlanError` when it is invalid or of another model."""
        from .latency_cost import LatencyCost, LatencyTable

        try:
            table = LatencyTable.model_validate(measured)
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}: " for part in first["loc"])
            raise PlanError(f"the recorded latencies are no latency table: {where}{first['msg']}") from error
        return LatencyCost(subject.graph, subject.groups, table)
