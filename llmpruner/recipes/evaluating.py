"""Measuring the quality of models, with results that are kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..calibration.documents import SUFFIXES
from ..errors import ModelError, SettingsError
from ..evaluation.base import ComparedModel, MetricSubject
from ..evaluation.run import Candidate, evaluate
from ..evaluation.store import ResultStore, default_folder
from ..evaluation.table import Evaluations
from ..files import is_file
from ..models.model import Model, Structure
from ..models.tokenizer import load_tokenizer
from ..plugins.catalog import Catalog
from ..progress import Progress
from ..settings import CacheSettings, EvaluateSettings
from .inputs import evaluated_fingerprint
from .jobs import evaluate_job
from .opening import Opener, Source
from .passages import read_passages
from .state import Hashes


def evaluate_models(
    sources: Sequence[Source],
    settings: EvaluateSettings,
    openers: Sequence[Opener],
    cache: CacheSettings,
    catalog: Catalog,
    progress: Progress,
) -> Evaluations:
    """``openers``: one for each source. Raises as `llmpruner.evaluate`."""
    job = evaluate_job(settings, catalog)
    compares = "--kl" if settings.kl else next((m.label() for m in job.metrics if m.needs_reference), None)
    if compares and len(sources) == 1:
        raise SettingsError(f"{compares} compares models with the first one, and only one is named; name two or more")
    for source in sources:
        _check_no_text(source)
    opened = [one.readable(source, "be evaluated") for one, source in zip(openers, sources, strict=True)]
    for found in opened:
        for metric in job.metrics:
            metric.check_model(found.ref, found.config)
    store = ResultStore(cache.cache or default_folder(), again=cache.again)
    hashes = Hashes(store.known_files, progress)
    candidates = [
        Candidate(
            one.ref, partial(_subject, one, opener), evaluated_fingerprint(one, opener.load, catalog, hashes),
            read_passages(one), partial(_compared, one, opener),
        )
        for one, opener in zip(opened, openers, strict=True)
    ]  # fmt: skip
    store.keep_files(hashes.known)
    try:
        return evaluate(candidates, job.metrics, progress, store)
    except KeyboardInterrupt:
        progress.status("stopped; what was measured is kept, and the same command goes on with the rest")
        raise


def _check_no_text(source: Source) -> None:
    """Raise `ModelError` for a text in the place of a model, as where ``--perplexity`` was forgotten."""
    if isinstance(source, (str, Path)) and Path(source).suffix.lower() in SUFFIXES and is_file(str(source)):
        raise ModelError(f"'{source}' is a file, not a model directory; for a text use --perplexity {source}")


def _compared(one: Structure, opener: Opener) -> ComparedModel:
    tokenizer = one.tokenizer if isinstance(one, Model) else load_tokenizer(one, opener.catalog, opener.load)
    return ComparedModel(one.ref, one.config, tokenizer, one.family)


def _subject(one: Structure, opener: Opener) -> MetricSubject:
    loaded = opener.weights(one)
    return MetricSubject(one.ref, loaded.model, loaded.tokenizer, loaded.graph, family=loaded.family)
