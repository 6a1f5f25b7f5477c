"""Evaluation of several models, with one in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, PluginError, SettingsError
from ..models.finite import first_not_finite
from ..progress import QUIET, Progress
from .base import Metric, MetricSubject
from .results import Evaluation, finite
from .table import Evaluations

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate(
    models: Iterable[Callable[[], MetricSubject]], metrics: Sequence[Metric], progress: Progress = QUIET
) -> Evaluations:
    """Measure every model by every metric, in the given order.

    ``models``: functions that load one model each. A model is loaded after the previous one was measured and freed;
    the first stays in memory as ``subject.reference`` where a metric needs it. Metrics are prepared before any model
    is loaded.

    Raises `SettingsError` when there is no metric or one name occurs twice, `ModelError` for weights that are not
    finite, `PluginError` for a metric whose result has no JSON form, and whatever the metrics raise.
    """
    _check_names(metrics)
    for metric in metrics:
        metric.prepare()
    needs_reference = any(metric.needs_reference for metric in metrics)
    reference: PreTrainedModel | None = None
    found = []
    for load in models:
        subject = load()
        if needs_reference and reference is None:
            reference = subject.model
        found.append(_measured(replace(subject, reference=reference, progress=progress), metrics))
        # The next model is loaded into the memory of this one.
        del subject
    return Evaluations(found)


def _check_names(metrics: Sequence[Metric]) -> None:
    names = [metric.name for metric in metrics]
    if not names:
        raise SettingsError("nothing to measure: name at least one metric")
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"the metric '{name}' is named twice; its results would have one name")


def _measured(subject: MetricSubject, metrics: Sequence[Metric]) -> Evaluation:
    # The score of a task would be a number all the same.
    wrong = first_not_finite(subject.model.named_parameters())
    if wrong is not None:
        raise ModelError(
            f"model '{subject.name}': parameter '{wrong}' holds NaN or infinite values; the checkpoint is damaged, or "
            f"{subject.model.dtype} is too narrow for it"
        )
    results = {metric.name: _checked(metric, metric.measure(subject)) for metric in metrics}
    rows = tuple(row for metric in metrics for row in metric.rows(results[metric.name]))
    return Evaluation(subject.name, results, rows)


def _checked(metric: Metric, result: Any) -> Mapping[str, Any]:
    """``result``. Raises `PluginError` unless it can be written as JSON: after the first model, not after the last."""
    try:
        json.dumps(finite(result))
    except (TypeError, ValueError) as error:
        raise PluginError(f"the result of metric '{metric.name}' cannot be written as JSON: {error}") from error
    if not isinstance(result, Mapping):
        raise PluginError(f"metric '{metric.name}' must give values by name, it gave {type(result).__name__}")
    return result
