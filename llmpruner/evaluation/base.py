"""Metric: one measurement of ``llmpruner evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component
from ..progress import QUIET, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..models.family import ModelFamily
    from ..structure.coupling import CouplingGraph


@dataclass(frozen=True)
class Row:
    """One number in the table. ``label``: the same for every model. ``higher_is_better``: None for neither. ``error``:
    its standard error, if known.

    ``scores``: where ``value`` is the mean of one score for each row of the data (question, document), these scores, in
    the order of the data. The table then has a further line with the difference to the first model and its paired
    standard error, for models that were scored on the same data: those with as many scores and an equal ``scored``, a
    text that names the data, such as a checksum of its rows."""

    label: str
    value: float | None
    higher_is_better: bool | None = None
    error: float | None = None
    scores: Sequence[float] | None = field(default=None, repr=False)
    scored: str | None = None


@dataclass(frozen=True)
class MetricSubject:
    """The model to measure, in evaluation mode. ``name``: as the user gave it. ``graph``: its coupled groups, after all
    cuts. ``reference``: the first model of the same call (for that one, the model itself); None unless a metric needs
    it. ``family``: for its chat format; None where it is not known."""

    name: str
    model: PreTrainedModel
    tokenizer: Any | None
    graph: CouplingGraph
    reference: PreTrainedModel | None = None
    progress: Progress = QUIET
    family: ModelFamily | None = None


@dataclass(frozen=True)
class ComparedModel:
    """A model that is not loaded yet. ``config``: of the dense model where it was pruned."""

    name: str
    config: PreTrainedConfig
    tokenizer: Any
    family: ModelFamily


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

    def check_model(self, ref: str, config: PreTrainedConfig) -> None:
        """Raise `DataError` for a model that cannot be measured, as far as its configuration says. Called for every
        model that ``evaluate`` is given, before any is loaded; by default nothing is checked."""

    def check_pair(self, first: ComparedModel, other: ComparedModel) -> None:
        """Raise `ModelError` where ``other`` cannot be compared with ``first``, the reference. Called after `prepare`,
        before any model is loaded, where `needs_reference`; by default nothing is checked."""

    def measure(self, subject: MetricSubject) -> Mapping[str, Any]:
        """JSON values by name, as ``evaluate --json`` writes them under the metric's name; a number that is not finite
        is written as null. Names state units where they are not plain (``kl_per_token``, in nats; ``weight_bytes``).
        Raises `ModelError` for a model that cannot be measured, such as one without a tokenizer."""
        raise NotImplementedError

    def parts(self) -> Sequence[str]:
        """Names of the parts of the result that are measured, and kept, one after the other (tasks, texts); by default
        one part. Called after `prepare`."""
        return ("",)

    def measure_part(self, subject: MetricSubject, part: str) -> Mapping[str, Any]:
        """The result of one part; by default `measure`. A metric with several parts overrides this instead."""
        del part
        return self.measure(subject)

    def joined(self, results: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
        """The whole result from those of the parts, by name; by default all their values together."""
        return {key: value for result in results.values() for key, value in result.items()}

    def depends_on(self, part: str) -> Mapping[str, Any] | None:
        """JSON values on which the result of a part depends, besides the model and the versions of llmpruner, torch and
        transformers: settings (``self.record()``), checksums of texts, versions of other packages. A result is kept on
        disk, and not measured again while they are the same. A part that is not described by them is named in them.
        None (the default): it is measured every time, as must be
        where it depends on the machine. Called after `prepare`."""
        del part
        return None

    def effort(self, part: str) -> float:
        """About how many tokens the model reads or writes for a part, for the time left."""
        del part
        return 1000.0

    def texts(self) -> Mapping[str, str]:
        """Name → text that models are measured on, which is compared with the calibration text of pruned models. Called
        after `prepare`."""
        return {}

    def rows(self, result: Mapping[str, Any]) -> Sequence[Row]:
        """The table's rows for ``result``; by default every number in it. Rows with equal labels are one line of the
        table, with a column for each model."""
        numbers = {key: v for key, v in result.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        return [Row(f"{self.name} {key}", float(value)) for key, value in numbers.items()]
