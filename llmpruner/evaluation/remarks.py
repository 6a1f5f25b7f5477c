"""Remarks on a table of results: a model that is judged on the text that it was calibrated on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import exp, log
from pathlib import Path

from .results import Evaluation

SEEN = 0.05
"""Share of a text's passages in the calibration text from which on the two are said to overlap."""
_FACTOR, _NATS = 2.0, 0.2
"""A cut is said to suit its calibration text most where the loss that it adds on another text is larger by this factor,
and by so many nats per token, than on that text."""


def is_uneven(own: float, other: float) -> bool:
    """Whether the loss that a cut adds, in nats per token, is much larger on an ``other`` text than on its ``own``."""
    return other > _FACTOR * max(own, 0.0) and other - own > _NATS


def remarks(evaluations: Sequence[Evaluation]) -> list[str]:
    """One line each: texts that a model's calibration read, and cuts that suit these texts alone."""
    first = evaluations[0] if evaluations else None
    found = []
    for one in evaluations:
        found += list(_seen(one))
        if first is not None and one is not first and not first.calibration_overlap:
            found += list(_suits_its_own(one, first))
    return found


def _seen(one: Evaluation) -> Iterator[str]:
    for name, share in one.calibration_overlap.items():
        if share >= SEEN:
            yield (
                f"{one.name}: its calibration read {share:.0%} of the passages of {Path(name).name}; what is measured "
                "there says little about other text"
            )


def _suits_its_own(one: Evaluation, dense: Evaluation) -> Iterator[str]:
    """Compares the ratios of perplexities, pruned to dense, on a text that the calibration read and on others."""
    added = _added_loss(one, dense)
    own = {name: nats for name, nats in added.items() if one.calibration_overlap.get(name, 0.0) >= SEEN}
    if not own:
        return
    seen = max(own, key=lambda name: one.calibration_overlap[name])
    for name, nats in added.items():
        if name not in own and is_uneven(own[seen], nats):
            yield (
                f"{one.name}: the cut suits its calibration text most: the perplexity is {exp(nats):.2f} times the "
                f"dense model's on {Path(name).name}, {exp(own[seen]):.2f} times on {Path(seen).name}, which its "
                "calibration read; calibrate on a mixture of texts like those that the model is for"
            )


def _added_loss(one: Evaluation, dense: Evaluation) -> Mapping[str, float]:
    """Text → ln(perplexity / perplexity of the dense model), for texts that both were measured on."""
    after, before = one.perplexities, dense.perplexities
    return {
        name: log(value / before[name]) for name, value in after.items() if name in before and value > 0 < before[name]
    }
