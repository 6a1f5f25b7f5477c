"""Metrics, and the measuring of several models by them, one model in memory at a time. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..catalog import Catalog
from ..component import Component, check_chosen
from ..errors import ModelError, PluginError, SettingsError, first_line
from ..progress import QUIET, Progress
from ..values import bytes_text, count_text, html_table

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..models.family import ModelFamily
    from ..models.model import Model
    from ..settings import EvaluateSettings
    from ..structure.coupling import CouplingGraph


@dataclass(frozen=True)
class Row:
    """One number in the table. ``label``: the same for every model. ``error``: its standard error, if known."""

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
        if "bytes" in self.label:
            return bytes_text(value)
        if 1e5 <= value < math.inf:
            return count_text(value)
        if value >= 1e3 and float(value).is_integer():
            return f"{value:,.0f}"
        digits = 4 if value < 10 else 2
        return f"{value:.{digits}f}" + ("" if self.error is None else f" ± {self.error:.4f}")


@dataclass(frozen=True)
class ComparedModel:
    """A model that is not loaded yet. ``name``: as the user gave it. ``config``: of a pruned one, the dense model's."""

    name: str
    config: PreTrainedConfig
    tokenizer: Any
    load: Callable[[], Model]


@dataclass(frozen=True)
class MetricSubject:
    """The model to measure, in evaluation mode. ``name``: as the user gave it. ``graph``: its coupled groups, after all
    cuts. ``reference``: the first model of the call, which may be this one, as `InTokens` for a model with a part of
    its vocabulary; None unless a metric needs it."""

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
    hook: ClassVar[str] = "llmpruner_metrics"

    @property
    def needs_reference(self) -> bool:
        """Whether ``subject.reference`` is needed, which keeps a second model in memory."""
        return False

    def prepare(self) -> None:
        """Read data (texts, tasks) before any model is loaded, and keep it. Called once. Raises `DataError`."""

    def check_models(self, models: Sequence[ComparedModel]) -> None:
        """Raise `DataError` or `ModelError` for models that cannot be measured or compared. Called after `prepare`."""

    def measure(self, subject: MetricSubject) -> Mapping[str, Any]:
        """JSON values by name, as ``evaluate --json`` writes them under the metric's name; a number that is not finite
        is written as null. Names state units where they are not plain (``kl_per_token``, in nats; ``weight_bytes``).
        Raises `ModelError` for a model that cannot be measured."""
        raise NotImplementedError

    def rows(self, result: Mapping[str, Any]) -> Sequence[Row]:
        """The table's rows for ``result``; by default every number in it. Rows with equal labels are one line."""
        numbers = {key: v for key, v in result.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        return [Row(f"{self.name} {key}", float(value)) for key, value in numbers.items()]


def chosen_metrics(settings: EvaluateSettings, catalog: Catalog) -> tuple[Metric, ...]:
    """Always the size, and perplexity on Python's help topics when nothing is named. Raises `SettingsError`."""
    chosen: dict[str, dict[str, Any]] = {"size": {}}
    options = {"text": settings.perplexity, "window": settings.window, "kl": settings.kl or None}
    if of_text := {key: value for key, value in options.items() if value is not None}:
        chosen["perplexity"] = of_text
    if settings.tasks is not None:
        chosen["tasks"] = {"names": settings.tasks, "limit": settings.limit}
    elif settings.limit is not None:
        raise SettingsError("--limit is of --tasks; name tasks")
    for name in settings.metrics or ():
        chosen.setdefault(name, {})
    if len(chosen) == 1 and not settings.metrics:
        chosen["perplexity"] = {}
    values = settings.settings
    metrics = tuple(catalog[Metric].create(name, {**chosen[name], **values.get(name, {})}) for name in chosen)
    check_chosen(values, metrics)
    return metrics


def evaluate(
    models: Sequence[ComparedModel],
    metrics: Sequence[Metric],
    progress: Progress = QUIET,
    on_result: Callable[[Evaluation], None] | None = None,
) -> Evaluations:
    """Measure every model by every metric; the first stays in memory where a metric compares. ``on_result``: called
    after each model. Raises `SettingsError` for one model to compare, `ModelError` for weights that are not finite."""
    comparing = [metric for metric in metrics if metric.needs_reference]
    if comparing and len(models) == 1:
        raise SettingsError(f"{comparing[0].label()} compares models with the first, and only one is named; name more")
    for metric in metrics:
        metric.check_models(models)
    from ..models.numbers import first_not_finite

    reference: Model | None = None
    evaluations = []
    for named in models:
        model = named.load()
        damaged = first_not_finite(model.network.named_parameters())
        if damaged is not None:  # the score of a task would be a number all the same
            damage = f"parameter '{damaged}' holds NaN or infinite values"
            narrow = f"the checkpoint is damaged, or {model.network.dtype} is too narrow for it"
            raise ModelError(f"model '{model.ref}': {damage}; {narrow}")
        if comparing and reference is None:
            reference = model
        first = None if reference is None else reference.in_tokens_of(model)
        subject = MetricSubject(named.name, model.network, model.tokenizer, model.family, model.graph, first, progress)
        results = {}
        for metric in metrics:
            progress.status(f"measuring {metric.name} of {named.name}")
            result = results[metric.name] = metric.measure(subject)
            try:
                json.dumps(dict(result))
            except (TypeError, ValueError) as error:
                raise PluginError(f"{metric.label()} gave no JSON values by name: {first_line(error)}") from error
        rows = tuple(row for metric in metrics for row in metric.rows(results[metric.name]))
        evaluations.append(Evaluation(named.name, results, rows))
        if len(models) > 1:  # of which a later one may fail
            shown = ", ".join(f"{row.label} {row.text}" for row in rows if row.value is not None)
            progress.status(f"{named.name}: {shown}")
        if on_result is not None:
            on_result(evaluations[-1])
        # The next model is loaded into the memory of this one.
        del model, subject, first
    return Evaluations(evaluations)


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one model. ``results``: metric → JSON values by name, which may include infinite numbers.
    ``rows``: of the table, in the order of the metrics. Properties are None where nothing was measured; those of the
    perplexity are of the first text, ``kl`` in nats per token from the first model, ``weight_bytes`` in memory."""

    name: str
    results: Mapping[str, Mapping[str, Any]]
    rows: tuple[Row, ...] = ()

    @property
    def perplexity(self) -> float | None:
        return self.results.get("perplexity", {}).get("perplexity")

    @property
    def bits_per_byte(self) -> float | None:
        return self.results.get("perplexity", {}).get("bits_per_byte")

    @property
    def kl(self) -> float | None:
        return self.results.get("perplexity", {}).get("kl_per_token")

    @property
    def parameters(self) -> int | None:
        return self.results.get("size", {}).get("parameters")

    @property
    def weight_bytes(self) -> int | None:
        return self.results.get("size", {}).get("weight_bytes")

    @property
    def tasks(self) -> dict[str, dict[str, float]]:
        """Task → metric → value, as lm-eval names them; empty where no task was run."""
        return {task: dict(values) for task, values in self.results.get("tasks", {}).items()}

    def as_json(self) -> dict[str, Any]:
        """``name``, and the results of the metrics by name. Numbers that are not finite become null."""
        plain: dict[str, Any] = json.loads(
            json.dumps({"name": self.name, **self.results}), parse_constant=lambda _: None
        )
        return plain

    def _repr_html_(self) -> str:
        return Evaluations([self])._repr_html_()


class Evaluations(tuple[Evaluation, ...]):
    """The evaluations of one call, in the order of its models. A notebook shows them as a table."""

    @property
    def lines(self) -> list[Line]:
        """The table: a line for each label that has a value, in the order of first occurrence."""
        columns = [{row.label: row for row in evaluation.rows} for evaluation in self]
        lines = []
        for label in dict.fromkeys(label for column in columns for label in column):
            better = next(column[label].higher_is_better for column in columns if label in column)
            rows = [column.get(label) or Row(label, None) for column in columns]
            if any(row.value is not None for row in rows):
                lines.append(Line(label, tuple(row.text for row in rows), better))
        return lines

    def of(self, name: str) -> Mapping[str, Mapping[str, Any]]:
        """The results of one model by metric; empty where it was not measured."""
        return next((each.results for each in self if each.name == name), {})

    def named(self, names: Sequence[str]) -> Evaluations:
        """The same with other names of the models."""
        return Evaluations(replace(each, name=name) for each, name in zip(self, names, strict=True))

    def as_json(self) -> list[dict[str, Any]]:
        return [evaluation.as_json() for evaluation in self]

    def _repr_html_(self) -> str:
        rows = [(line.label, *line.cells) for line in self.lines]
        return html_table(rows, ("", *(evaluation.name for evaluation in self)))


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table. ``cells``: the text for each model."""

    label: str
    cells: tuple[str, ...]
    higher_is_better: bool | None
