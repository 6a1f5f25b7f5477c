"""Checks of a training that need no model, and so come before anything that takes long. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..calibration.mixture import parse_mixture
from .examples import load_examples, rows_of, validation_records
from .schedule import steps, warmup_steps, with_batch

if TYPE_CHECKING:
    from ..discovery.family import ModelFamily
    from ..settings import RecoverSettings
    from .dense_text import DenseText


def check_before_writing(
    settings: RecoverSettings, own: DenseText, family: ModelFamily, tokenizer: Any, layers: int
) -> None:
    """Raise `DataError` and `SettingsError` for mistakes that `prepare` and the training would find, as far as they can
    be known before the dense model writes ``own``. ``layers``: see `check_steps`."""
    most = own.answers + own.texts
    for part in parse_mixture(settings.data):
        if part.source != own.source:
            most += len(load_examples(part.source, family, tokenizer).texts)
    most = most if settings.limit is None else min(most, settings.limit)
    if settings.validation_data is not None:
        held_out = load_examples(settings.validation_data, family, tokenizer)
        rows_of(held_out, tokenizer, cutoff=settings.cutoff, loss_on=settings.loss_on, pack=settings.pack)
    else:
        most -= validation_records(settings.validation, most, settings.data)
    # Packed, long texts are several rows.
    if not settings.pack:
        check_steps(settings, most, layers)


def check_steps(settings: RecoverSettings, rows: int, layers: int, processes: int = 1) -> None:
    """Raise `SettingsError` for more steps of warm-up than a training on ``rows`` rows has. ``layers``: of a strategy
    that trains them one by one, among which ``max_steps`` are shared; else 1."""
    if settings.minutes is None:
        settings = with_batch(settings, lambda one: steps(one, rows), processes)
        total = steps(settings, rows)
        warmup_steps(settings, total if settings.max_steps is None else max(1, total // layers))
