"""Metric: one measurement of ``llmpruner evaluate``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component
from ..progress import QUIET, Progress
from ..values import bytes_text, count_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..discovery.family import ModelFamily
    from ..models.model import Model
    from ..structure.coupling import CouplingGraph


@dataclass(frozen=True)
class Row:
    """One number in the table. ``label``: the same for every model. ``higher_is_better``: None for neither. ``error``:
    its standard error, if known."""

    label: str
    value: float | None
    higher_is_better: bool | None = None
    error: float | None = None

    @property
    def text(self) -> str:
        """The value as the table has it; ``-`` for None."""
        value = self.value
        if value is None:
            return "-"
        if self.label.endswith("bytes"):
            return bytes_text(value)
        if 1e5 <= value < math.inf:
            return count_text(value)
        if value >= 1e3 and float(value).is_integer():
            return f"{value:,.0f}"
        digits = 4 if value < 10 else 2
        return f"{value:.{digits}f}" + ("" if self.error is None else f" ± {self.error:.4f}")


@dataclass(frozen=True)
class ComparedModel:
    """A model that is not loaded yet. ``name``: as the user gave it. ``config``: of the dense model where it was
    pruned."""

    name: str
    config: PreTrainedConfig
    tokenizer: Any
    load: Callable[[], Model]


@dataclass(frozen=True)
class MetricSubject:
    """The model to measure, in evaluation mode. ``name``: as the user gave it. ``graph``: its coupled groups, after all
    cuts. ``reference``: the first model of the same call (for that one, the model itself), as `InTokens` for a model
    with a part of its vocabulary; None unless a metric needs it."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    family: ModelFamily
    graph: CouplingGraph
    reference: PreTrainedModel | None = None
    progress: Progress = QUIET


class Metric(Component):
    """Measures one model at a time; created once for all models of a call.

    ::

        class Vocabulary(Metric):
            name = "vocabulary"
            summary = "tokens of the vocabulary that a text uses"

            class Settings(ComponentSettings):
                text: str = Field("The quick brown fox.", description="The text.")

            settings: Settings

            def measure(self, subject):
                return {"tokens": len(set(subject.tokenizer(self.settings.text)["input_ids"]))}
    """

    kind: ClassVar[str] = "metric"

    @property
    def needs_reference(self) -> bool:
        """Whether ``subject.reference`` is needed, which keeps a second model in memory."""
        return False

    def prepare(self) -> None:
        """Read data (texts, tasks) and keep it on the instance, so that errors are found before any model is loaded.
        Called once. Raises `DataError`."""

    def check_models(self, models: Sequence[ComparedModel]) -> None:
        """Refuse what can be refused before a model is loaded: raise `DataError` for one that cannot be measured,
        `ModelError` for one that cannot be compared with the first. Called once, after `prepare`."""

    def measure(self, subject: MetricSubject) -> Mapping[str, Any]:
        """JSON values by name, as ``evaluate --json`` writes them under the metric's name; a number that is not finite
        is written as null. Names state units where they are not plain (``kl_per_token``, in nats; ``weight_bytes``).
        Raises `ModelError` for a model that cannot be measured."""
        raise NotImplementedError

    def rows(self, result: Mapping[str, Any]) -> Sequence[Row]:
        """The table's rows for ``result``; by default every number in it. Rows with equal labels are one line of the
        table, with a column for each model."""
        numbers = {key: v for key, v in result.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        return [Row(f"{self.name} {key}", float(value)) for key, value in numbers.items()]
