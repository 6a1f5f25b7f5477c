"""Evaluation of several models, with one in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..amounts import counted
from ..calibration.passages import overlap
from ..errors import ModelError, PluginError, SettingsError
from ..models.finite import first_not_finite
from ..progress import QUIET, Progress
from .base import ComparedModel, Metric, MetricSubject
from .pieces import Pieces
from .results import Evaluation, finite
from .store import ResultStore
from .table import Evaluations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Found = dict[tuple[str, str], Mapping[str, Any]]
"""Metric and part → result."""


@dataclass(frozen=True)
class Candidate:
    """A model to measure. ``fingerprint``: JSON values that are the same for equal weights that are loaded in the same
    way; None where that is not known, so that no result is kept. ``passages``: fingerprints of its calibration text
    (`llmpruner.calibration.passages`). ``compared``: what metrics that compare models check before any is loaded."""

    name: str
    load: Callable[[], MetricSubject]
    fingerprint: Any = None
    passages: Collection[str] = ()
    compared: Callable[[], ComparedModel] | None = None


def evaluate(
    models: Sequence[Candidate],
    metrics: Sequence[Metric],
    progress: Progress = QUIET,
    store: ResultStore | None = None,
) -> Evaluations:
    """Measure every model by every metric, in the given order.

    A model is loaded after the previous one was measured and freed; the first stays in memory as ``subject.reference``
    where a metric needs it. Metrics are prepared before any model is loaded. Results that ``store`` has are taken from
    it, a model that has all of them is not loaded, and every other result is kept as soon as it is measured.

    Raises `SettingsError` when there is no metric or one name occurs twice, `ModelError` for weights that are not
    finite, `PluginError` for a metric whose result has no JSON form, and whatever the metrics raise.
    """
    _check_names(metrics)
    for metric in metrics:
        metric.prepare()
    _check_pairs(models, [metric for metric in metrics if metric.needs_reference])
    pairs = [(metric, part) for metric in metrics for part in metric.parts()]
    identities = [
        {key: value for metric in metrics for key, value in _identities(one, models[0], metric).items()}
        for one in models
    ]
    found: list[Found] = [_kept(store, identity) for identity in identities]
    known = sum(map(len, found))
    if known:
        were = "was" if known == 1 else "were"
        every = counted(len(models) * len(pairs), "result")
        progress.status(f"{known:,} of {every} {were} measured before and kept")
    missing = [[(metric, part) for metric, part in pairs if (metric.name, part) not in one] for one in found]
    total = sum(metric.effort(part) for one in missing for metric, part in one)
    if total:
        with progress.bar("evaluate") as at:
            _measure(models, missing, identities, found, Pieces(at, total, progress), store)
    return Evaluations(_evaluation(one, metrics, results) for one, results in zip(models, found, strict=True))


def _measure(
    models: Sequence[Candidate],
    missing: Sequence[Sequence[tuple[Metric, str]]],
    identities: Sequence[Mapping[tuple[str, str], Mapping[str, Any] | None]],
    found: Sequence[Found],
    pieces: Pieces,
    store: ResultStore | None,
) -> None:
    """Add what is missing to ``found``."""
    needs_reference = any(metric.needs_reference for one in missing for metric, _ in one)
    reference: PreTrainedModel | None = None
    for number, (candidate, wanted) in enumerate(zip(models, missing, strict=True)):
        if not wanted:
            continue
        if number and reference is None and any(metric.needs_reference for metric, _ in wanted):
            reference = _loaded(models[0]).model
        subject = _loaded(candidate)
        if needs_reference and not number:
            reference = subject.model
        for metric, part in wanted:
            with pieces.piece(_label(candidate, metric, part), metric.effort(part)) as own:
                seen = replace(subject, reference=reference if metric.needs_reference else None, progress=own)
                result = _checked(metric, metric.measure_part(seen, part))
            found[number][metric.name, part] = result
            identity = identities[number][metric.name, part]
            if store is not None and identity is not None:
                store.keep(identity, result)
        # The next model is loaded into the memory of this one.
        del subject, seen


def _label(candidate: Candidate, metric: Metric, part: str) -> str:
    return f"{candidate.name}: {metric.name}" + (f" {part}" if part and part not in candidate.name else "")


def _identities(one: Candidate, first: Candidate, metric: Metric) -> dict[tuple[str, str], dict[str, Any] | None]:
    """(metric, part) → what the result depends on. Parts of which the metric says the same differ by their names."""
    found = {part: _identity(one, first, metric, part) for part in metric.parts()}
    every = list(found.values())
    return {
        (metric.name, part): {**value, "part": part} if value is not None and every.count(value) > 1 else value
        for part, value in found.items()
    }


def _identity(one: Candidate, first: Candidate, metric: Metric, part: str) -> dict[str, Any] | None:
    """What the result depends on; None where it cannot be kept."""
    depends = metric.depends_on(part)
    compared = first.fingerprint if metric.needs_reference else "none"
    if depends is None or one.fingerprint is None or compared is None:
        return None
    return {
        "model": one.fingerprint,
        "reference": compared,
        "metric": metric.name,
        "depends on": dict(depends),
    }


def _kept(store: ResultStore | None, identities: Mapping[tuple[str, str], Mapping[str, Any] | None]) -> Found:
    if store is None:
        return {}
    found = {key: store.find(identity) for key, identity in identities.items() if identity is not None}
    return {key: result for key, result in found.items() if result is not None}


def _evaluation(one: Candidate, metrics: Sequence[Metric], found: Found) -> Evaluation:
    results = {m.name: m.joined({part: found[m.name, part] for part in m.parts()}) for m in metrics}
    rows = tuple(row for metric in metrics for row in metric.rows(results[metric.name]))
    seen: dict[str, float] = {}
    if one.passages:
        shares = {name: overlap(text, one.passages) for metric in metrics for name, text in metric.texts().items()}
        seen = {name: share for name, share in shares.items() if share is not None}
    return Evaluation(one.name, results, rows, seen)


def _check_pairs(models: Sequence[Candidate], metrics: Sequence[Metric]) -> None:
    first, *others = models
    if not metrics or first.compared is None:
        return
    reference = first.compared()
    for other in others:
        if other.compared is not None:
            compared = other.compared()
            for metric in metrics:
                metric.check_pair(reference, compared)


def _check_names(metrics: Sequence[Metric]) -> None:
    names = [metric.name for metric in metrics]
    if not names:
        raise SettingsError("nothing to measure: name at least one metric")
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"the metric '{name}' is named twice; its results would have one name")


def _loaded(candidate: Candidate) -> MetricSubject:
    """The model. Raises `ModelError` unless its weights are finite: the score of a task would be a number all the
    same."""
    subject = candidate.load()
    wrong = first_not_finite(subject.model.named_parameters())
    if wrong is not None:
        raise ModelError(
            f"model '{subject.name}': parameter '{wrong}' holds NaN or infinite values; the checkpoint is damaged, or "
            f"{subject.model.dtype} is too narrow for it"
        )
    return subject


def _checked(metric: Metric, result: Any) -> Mapping[str, Any]:
    """``result``. Raises `PluginError` unless it can be written as JSON: after the first model, not after the last."""
    try:
        json.dumps(finite(result))
    except (TypeError, ValueError) as error:
        raise PluginError(f"the result of metric '{metric.name}' cannot be written as JSON: {error}") from error
    if not isinstance(result, Mapping):
        raise PluginError(f"metric '{metric.name}' must give values by name, it gave {type(result).__name__}")
    return result
