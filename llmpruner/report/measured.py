"""The sections of what was measured: ``quality``, ``cost`` (sizes and speed), and ``answers`` side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..values import bytes_text, count_text, counted
from .base import Costs, Measurements, ReportSection, ReportSubject, bare, rendered


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


class CostSection(ReportSection):
    """Nothing without evidence."""

    name = "cost"
    summary = "parameters, bytes, operations and cache before and after, and measured speed beside the ideal"
    order = 14

    def render(self, subject: ReportSubject) -> str | None:
        evidence = subject.evidence
        if evidence is None or evidence.dense is None or evidence.costs is None:
            return None
        rows = _rows(evidence.dense, evidence.costs)
        benches = [(_title(bench), _speeds(bench)) for bench in evidence.benches]
        return rendered("cost.html.j2", rows=rows, benches=benches, name=evidence.name, context=evidence.costs.context)


def _rows(dense: Costs, own: Costs) -> list[tuple[str, str, str, str]]:
    pairs: list[tuple[str, float | None, float | None, Any]] = [
        ("Parameters", dense.parameters, own.parameters, count_text),
        ("Parameters of the decoder", dense.decoder_parameters, own.decoder_parameters, count_text),
        ("Bytes of the weights", dense.weight_bytes, own.weight_bytes, bytes_text),
        ("MACs per token", dense.macs_per_token, own.macs_per_token, count_text),
        ("KV cache per token, bytes", dense.cache_bytes, own.cache_bytes, "{:,}".format),
    ]
    return [
        # A state space model has no keys and values, of which nothing can be removed.
        (label, text(before), text(after), f"{1 - after / before:.1%}" if before else "–")
        for label, before, after, text in pairs
        if before is not None and after is not None
    ]


def _title(bench: Mapping[str, Any]) -> str:
    runs, tokens = counted(bench["rounds"], "run"), counted(bench["new_tokens"], "token")
    return f"{bench['runtime']}, medians of {runs} in turn, {tokens} decoded"


def _speeds(bench: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (stage, str(case["batch"]), f"{case['prompt_tokens']:,}", one["name"], *_cells(one[key]))
        for key, stage in (("prefill", "Prefill"), ("decode", "Decoding"))
        for case in bench["cases"]
        for one in case["models"]
    ]


def _cells(rate: Mapping[str, Any]) -> tuple[str, ...]:
    speed = rate["tokens_per_second"]
    median, lower, upper = (_number(speed[key]) for key in ("median", "lower_quartile", "upper_quartile"))
    ideal, share = rate["ideal"], rate["share_of_ideal"]
    return (
        median, f"{lower}–{upper}", f"{rate['speedup']['median']:.2f}", "–" if ideal is None else f"{ideal:.2f}",
        "–" if share is None else f"{share:.0%}",
    )  # fmt: skip


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


@dataclass(frozen=True)
class Answer:
    """A text in three parts: ``same`` as the first model's, the word ``parts`` where they differ first, and ``rest``.
    ``equal``: how much is the same, in words; empty for the first model, and where both texts are equal."""

    name: str
    same: str
    parts: str = ""
    rest: str = ""
    equal: str = ""


class AnswersSection(ReportSection):
    """Nothing where no texts were generated."""

    name = "answers"
    summary = "the same prompts answered side by side, and the words where the answers part"
    order = 12

    def render(self, subject: ReportSubject) -> str | None:
        if subject.evidence is None:
            return None
        asked = [
            (texts[0]["prompt"], side_by_side([(one["name"], one["text"]) for one in texts]))
            for texts in subject.evidence.answers
        ]
        return rendered("answers.html.j2", asked=asked) if asked else None


def side_by_side(texts: Sequence[tuple[str, str]]) -> list[Answer]:
    """``texts``: (name of the model, its text); each is compared with the first."""
    (name, first), *others = texts
    return [Answer(name, first), *(_parted(other, _words(first), _words(text)) for other, text in others)]


def _words(text: str) -> list[str]:
    """Words, signs and blanks, which make up the text."""
    return re.findall(r"\s+|\w+|[^\w\s]", text)


def _parted(name: str, first: Sequence[str], own: Sequence[str]) -> Answer:
    place = next((n for n, (a, b) in enumerate(zip(first, own, strict=False)) if a != b), min(len(first), len(own)))
    if place == len(own) == len(first):
        return Answer(name, "".join(own))
    same = own[:place]
    shown, rest = _first(own[place:])
    words = sum(word.isalnum() for word in same)
    return Answer(name, "".join(same), shown, rest, f"{words} word{'' if words == 1 else 's'}")


def _first(words: Sequence[str]) -> tuple[str, str]:
    """The first word or sign, with a blank before it, which alone could not be seen; and what follows."""
    end = 2 if words and words[0].isspace() else 1
    return "".join(words[:end]), "".join(words[end:])
