"""The calibration text of a pruned model, as its record keeps it."""

from __future__ import annotations

from typing import Any

from ..calibration.calibration import CalibrationSet
from ..calibration.passages import passages_of
from ..models.model import Model, Structure

_KEY = "calibration_passages"


def passages_in(calibration: CalibrationSet | None, tokenizer: Any | None) -> tuple[str, ...]:
    """Fingerprints of the passages that a calibration read; none without text, or without a tokenizer to decode it."""
    if calibration is None or tokenizer is None:
        return ()
    return tuple(passages_of(tokenizer.batch_decode(calibration.input_ids.tolist(), skip_special_tokens=True)))


def passages_record(model: Model) -> dict[str, list[str]]:
    """The entry of a model's record: those of earlier prunes as well."""
    found = read_passages(model)
    return {_KEY: sorted(found)} if found else {}


def read_passages(structure: Structure) -> frozenset[str]:
    """The fingerprints in the record of a model, and of what was read in this process; empty where there are none."""
    own = structure.passages if isinstance(structure, Model) else ()
    return frozenset((*(structure.record or {}).get(_KEY, ()), *own))
