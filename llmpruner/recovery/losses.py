"""The loss of a training before and after, from its record. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from ..values import counted


def first_and_last(record: Mapping[str, Any]) -> tuple[str, float, float] | None:
    """What the loss is, in words, its first and its last value; None for a training without losses. ``record``: an
    entry of ``recovery`` in ``llmpruner.json``.

    Where layers were trained one after the other, the mean over layers of their losses before and after: those of
    single steps are of different layers."""
    if layers := record.get("layers"):
        before, after = (fmean(layer[key] for layer in layers) for key in ("before", "after"))
        return f"mean loss of {counted(len(layers), 'layer')}", before, after
    losses = record.get("losses")
    return ("loss", losses[0], losses[-1]) if losses else None


def loss_text(record: Mapping[str, Any]) -> str:
    """``loss 2.500 → 1.250``; empty for a training without losses."""
    found = first_and_last(record)
    if found is None:
        return ""
    what, before, after = found
    # Relative errors of layers are small numbers.
    digits = 4 if record.get("layers") else 3
    return f"{what} {before:.{digits}f} → {after:.{digits}f}"
