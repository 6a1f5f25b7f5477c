"""The section ``quality``: what was measured of the dense and of the pruned model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..amounts import counted
from .base import Measurements, ReportSection, ReportSubject
from .templates import bare, rendered


class QualitySection(ReportSection):
    """A table for each call of ``evaluate``; nothing without evidence."""

    name = "quality"
    summary = "perplexity, divergence and tasks of dense and pruned models"
    order = 11

    def render(self, subject: ReportSubject) -> str | None:
        evidence = subject.evidence
        if evidence is None:
            return None
        tables = [
            {"names": one.names, "lines": one.lines, "facts": _facts(one), "own": evidence.name}
            for one in evidence.measured
        ]
        calibration = calibration_of(subject.record)
        return rendered("quality.html.j2", tables=tables, calibration=calibration, name=evidence.name)


def calibration_of(record: Mapping[str, Any]) -> str | None:
    """The texts that the plans were ranked on and fitted to, as the user named them, each once, separated by commas;
    None without. Those of an earlier plan count: the weights that it fitted are in the model."""
    parts = [plan.get(part) for plan in record.get("plans") or () for part in ("estimation", "compensation")]
    names = dict.fromkeys(bare(part["calibration"]) for part in parts if (part or {}).get("calibration"))
    return ", ".join(names) or None


def _facts(measured: Measurements) -> str:
    """What the perplexity was measured on."""
    first = next((result["perplexity"] for result in measured.results if result.get("perplexity")), None)
    if first is None:
        return ""
    texts = {measured.text_of(first): first, **first["others"]}
    each = "; ".join(f"{counted(of['tokens'], 'token')} of {bare(text)}" for text, of in texts.items())
    window, predicted = counted(first["window"], "token"), counted(first["window"] - 1, "prediction")
    return f"Perplexity: {each}; windows of {window} with {predicted} each."
