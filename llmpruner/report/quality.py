"""The section ``quality``: every measured quantity of the dense and of the pruned models side by side, text by text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

from ..amounts import counted
from ..evaluation.remarks import SEEN, is_uneven
from .base import DENSE, Evidence, Measurements, ReportSection, ReportSubject
from .templates import bare, rendered


@dataclass(frozen=True)
class TextLoss:
    """By how much the loss per token on a text rose, in nats. ``own``: whether the calibration text is of the same
    source."""

    text: str
    rise: float
    own: bool


class QualitySection(ReportSection):
    """A table for each call of ``evaluate``, and a warning where the loss rises very unevenly; nothing without
    evidence."""

    name = "quality"
    summary = "perplexity, divergence and tasks of dense and pruned models, and how evenly texts are affected"
    order = 11

    def render(self, subject: ReportSubject) -> str | None:
        evidence = subject.evidence
        if evidence is None:
            return None
        calibration = calibration_of(subject.record)
        tables = [
            {"names": one.names, "lines": one.lines, "facts": _facts(one), "own": evidence.name}
            for one in evidence.measured
        ]
        losses = text_losses(evidence, calibration)
        return rendered(
            "quality.html.j2", tables=tables, calibration=calibration, warning=uneven(losses, calibration),
            losses=losses if len(losses) > 1 else [], only_own=bool(losses) and all(one.own for one in losses),
            name=evidence.name,
        )  # fmt: skip

    def style(self) -> str:
        return rendered("quality.css.j2")


def calibration_of(record: Mapping[str, Any]) -> str | None:
    """The texts that the plans were ranked on and fitted to, as the user named them, each once, separated by commas;
    None without. Those of an earlier plan count: the weights that it fitted are in the model."""
    parts = [plan.get(part) for plan in record.get("plans") or () for part in ("estimation", "compensation")]
    found = dict.fromkeys(bare(part["calibration"]) for part in parts if (part or {}).get("calibration"))
    return ", ".join(found) or None


def text_losses(evidence: Evidence, calibration: str | None) -> list[TextLoss]:
    """For every text on which the dense model and the checkpoint were measured."""
    found: dict[str, TextLoss] = {}
    for one in evidence.measured:
        before, after = (_perplexities(one, name) for name in (DENSE, evidence.name))
        overlap = one.of(evidence.name).get("calibration_overlap") or {}
        for text in (text for text in after if text in before):
            own = _same_source(text, calibration) or overlap.get(text, 0.0) >= SEEN
            found[text] = TextLoss(bare(text), log(after[text]) - log(before[text]), own)
    return list(found.values())


def _perplexities(one: Measurements, name: str) -> dict[str, float]:
    """Text → perplexity of one model; a text without a name is known by the start of its checksum."""
    result = one.of(name).get("perplexity") or {}
    first = one.text_of(result)
    found = {first: result.get("perplexity"), **{t: r["perplexity"] for t, r in (result.get("others") or {}).items()}}
    return {text: value for text, value in found.items() if value}


def uneven(losses: Sequence[TextLoss], calibration: str | None) -> str:
    """A line where the loss rises much more on another text than on one of the calibration's source; empty otherwise.
    Texts that no calibration has seen differ for other reasons."""
    own, others = [one for one in losses if one.own], [one for one in losses if not one.own]
    if not own or not others:
        return ""
    least, most = min(own, key=lambda one: one.rise), max(others, key=lambda one: one.rise)
    if not is_uneven(least.rise, most.rise):
        return ""
    fitted = f"; it was calibrated on {calibration}" if calibration else ""
    return (
        f"The compensation helped its own text more than others: the loss rises by {least.rise:.2f} nats per token on "
        f"{least.text}, but by {most.rise:.2f} on {most.text}{fitted}. Calibrate with text of the kind that the model "
        "is for, or a mixture."
    )


def _same_source(text: str, calibration: str | None) -> bool:
    """Whether both are named after one data set: ``wikitext2_unk_test`` and ``wikitext2``."""
    own, others = _stem(text), [_stem(part) for part in (calibration or "").split(",")]
    return bool(own) and own in others


def _stem(text: str) -> str:
    """``data/wikitext2_unk_test.txt`` → ``wikitext2``."""
    name = re.split(r"[/\\]", text.strip())[-1].rpartition("*")[2].partition(":")[0]
    return re.split(r"[._-]", name.lower())[0]


def _facts(one: Measurements) -> str:
    """What the perplexity was measured on."""
    found = next((result["perplexity"] for result in one.results if result.get("perplexity")), None)
    if found is None or "tokens" not in found:
        return ""
    several = {one.text_of(found): found, **(found.get("others") or {})}
    each = "; ".join(f"{counted(of['tokens'], 'token')} of {bare(text)}" for text, of in several.items())
    window, predicted = counted(found["window"], "token"), counted(found["window"] - 1, "prediction")
    of_window = f"windows of {window} with {predicted}"
    return f"Perplexity: {each}; {of_window} each."
