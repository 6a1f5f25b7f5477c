"""Measure several models by several metrics, one model in memory at a time, and lay the results out as a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..component import check_chosen
from ..errors import ModelError, SettingsError
from ..progress import QUIET, Progress
from ..values import html_table
from .base import ComparedModel, Metric, MetricSubject, Row
from .tasks import Scores

if TYPE_CHECKING:
    from ..models.model import Model
    from ..plugins.catalog import Catalog
    from ..settings import EvaluateSettings


def chosen_metrics(settings: EvaluateSettings, catalog: Catalog) -> tuple[Metric, ...]:
    """Always the size, and perplexity on Python's help topics when nothing is named. Raises `SettingsError`."""
    chosen: dict[str, dict[str, Any]] = {"size": {}}
    of_text = {"text": settings.perplexity, "window": settings.window, "kl": settings.kl or None}
    if any(value is not None for value in of_text.values()):
        chosen["perplexity"] = {key: value for key, value in of_text.items() if value is not None}
    if settings.tasks is not None:
        chosen["tasks"] = {"names": settings.tasks, "limit": settings.limit}
    elif settings.limit is not None:
        raise SettingsError("--limit is of --tasks; name tasks")
    for name in settings.metrics or ():
        chosen.setdefault(name, {})
    if len(chosen) == 1 and not settings.metrics:
        chosen["perplexity"] = {}
    own = settings.settings
    metrics = tuple(catalog.metrics.create(name, {**chosen[name], **own.get(name, {})}) for name in chosen)
    check_chosen(own, metrics)
    return metrics


def evaluate(
    models: Sequence[ComparedModel],
    metrics: Sequence[Metric],
    progress: Progress = QUIET,
    on_result: Callable[[Evaluation], None] | None = None,
) -> Evaluations:
    """Measure every model by every metric. A model is loaded once the previous one was measured and freed; the first
    stays in memory as ``subject.reference`` where a metric needs it. ``on_result``: called after each model. Raises
    `SettingsError` where one model is to be compared, `ModelError` for weights that are not finite, and what metrics
    raise."""
    comparing = [metric for metric in metrics if metric.needs_reference]
    if comparing and len(models) == 1:
        raise SettingsError(f"{comparing[0].label()} compares models with the first, and only one is named; name more")
    for metric in metrics:
        metric.prepare()
        metric.check_models(models)
    from ..models.trimmed import in_tokens_of

    reference: Model | None = None
    evaluations = []
    for named in models:
        model = named.load()
        _check_finite(model)
        if comparing and reference is None:
            reference = model
        first = None if reference is None else in_tokens_of(model, reference)
        subject = MetricSubject(named.name, model.model, model.tokenizer, model.family, model.graph, first, progress)
        results = {}
        for metric in metrics:
            progress.status(f"measuring {metric.name} of {named.name}")
            results[metric.name] = metric.measure(subject)
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


def _check_finite(model: Model) -> None:
    """Raise `ModelError` unless all weights are finite: the score of a task would be a number all the same."""
    from ..models.numbers import first_not_finite

    wrong = first_not_finite(model.model.named_parameters())
    if wrong is not None:
        raise ModelError(
            f"model '{model.ref}': parameter '{wrong}' holds NaN or infinite values; the checkpoint is damaged, or "
            f"{model.model.dtype} is too narrow for it"
        )


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one model. ``results``: metric → JSON values by name, which may include infinite numbers.
    ``rows``: the table's rows, in the order of the metrics. Those used most are attributes; None where not measured."""

    name: str
    results: Mapping[str, Mapping[str, Any]]
    rows: tuple[Row, ...] = ()

    @property
    def perplexity(self) -> float | None:
        """On the first text."""
        return self.results.get("perplexity", {}).get("perplexity")

    @property
    def bits_per_byte(self) -> float | None:
        """On the first text."""
        return self.results.get("perplexity", {}).get("bits_per_byte")

    @property
    def kl(self) -> float | None:
        """Divergence from the first model in nats per token, on the first text."""
        return self.results.get("perplexity", {}).get("kl_per_token")

    @property
    def parameters(self) -> int | None:
        """Tied ones once."""
        return self.results.get("size", {}).get("parameters")

    @property
    def weight_bytes(self) -> int | None:
        """In memory."""
        return self.results.get("size", {}).get("weight_bytes")

    @property
    def tasks(self) -> Scores:
        """Task → metric → value, as lm-eval names them; empty where no task was run."""
        return {task: dict(values) for task, values in self.results.get("tasks", {}).items()}

    def as_json(self) -> dict[str, Any]:
        """``name``, and the results of the metrics by name. Numbers that are not finite become null."""
        text = json.dumps({"name": self.name, **self.results})
        plain: dict[str, Any] = json.loads(text, parse_constant=lambda name: None)
        return plain

    def _repr_html_(self) -> str:
        return Evaluations([self])._repr_html_()


class Evaluations(tuple[Evaluation, ...]):
    """The evaluations of one call, in the order of its models. A notebook shows them as a table."""

    __slots__ = ()

    @property
    def lines(self) -> list[Line]:
        """The table: a line for each label of the rows, in the order of first occurrence, without labels that have no
        value."""
        columns = [{row.label: row for row in evaluation.rows} for evaluation in self]
        lines = []
        for label in dict.fromkeys(label for column in columns for label in column):
            better = next(column[label].higher_is_better for column in columns if label in column)
            rows = [column.get(label) or Row(label, None) for column in columns]
            if any(row.value is not None for row in rows):
                lines.append(Line(label, tuple(row.text for row in rows), better))
        return lines

    def of(self, name: str) -> Mapping[str, Mapping[str, Any]]:
        """The results of one model by metric; empty for a model that was not measured."""
        return next((each.results for each in self if each.name == name), {})

    def as_json(self) -> list[dict[str, Any]]:
        """One object per model; see `Evaluation.as_json`."""
        return [evaluation.as_json() for evaluation in self]

    def _repr_html_(self) -> str:
        rows = [(line.label, *line.cells) for line in self.lines]
        return html_table(rows, ("", *(evaluation.name for evaluation in self)))


@dataclass(frozen=True, slots=True)
class Line:
    """One quantity for all models. ``cells``: the text for each."""

    label: str
    cells: tuple[str, ...]
    higher_is_better: bool | None
