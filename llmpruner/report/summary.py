"""The section ``summary``: the figures by which a checkpoint is judged, next to the dense model's, and one sentence on
them. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from ..values import bytes_text, count_text, counted
from .base import DENSE, Evidence, ReportSection, ReportSubject, bare, rendered


@dataclass(frozen=True)
class Pair:
    """One figure of the dense model and of the pruned one. ``ideal``: of a speed-up, what sizes allow."""

    label: str
    dense: float
    pruned: float
    ideal: float | None = None

    @property
    def ratio(self) -> float:
        return self.pruned / self.dense


@dataclass(frozen=True)
class Figures:
    """What is known; None for what was not measured. ``perplexity``: on the text that was measured first, of those that
    the dense model was measured on too; ``text``: its name. ``tasks``: mean of the accuracies; ``count``: of how many.
    ``decode``: tokens per second."""

    parameters: Pair | None = None
    weights: Pair | None = None
    perplexity: Pair | None = None
    text: str | None = None
    tasks: Pair | None = None
    count: int = 0
    decode: Pair | None = None


def figures(evidence: Evidence) -> Figures:
    """The `Figures` of a checkpoint."""
    dense, own = evidence.dense, evidence.costs
    parameters = weights = None
    if dense is not None and own is not None:
        parameters = Pair("Parameters of the decoder", dense.decoder_parameters, own.decoder_parameters)
        weights = Pair("Weights", dense.weight_bytes, own.weight_bytes)
    perplexity, text = _perplexity(evidence)
    tasks, count = _tasks(evidence)
    return Figures(parameters, weights, perplexity, text, tasks, count, _decode(evidence))


def _perplexity(evidence: Evidence) -> tuple[Pair | None, str | None]:
    for measured in evidence.measured:
        dense, own = (measured.of(name).get("perplexity") or {} for name in (DENSE, evidence.name))
        if dense.get("perplexity") is not None and own.get("perplexity") is not None:
            return Pair("Perplexity", dense["perplexity"], own["perplexity"]), bare(measured.text_of(dense))
    return None, None


def _tasks(evidence: Evidence) -> tuple[Pair | None, int]:
    dense, own = (_accuracies(evidence, name) for name in (DENSE, evidence.name))
    both = [task for task in dense if task in own]
    if not both:
        return None, 0
    before, after = (fmean(scores[task] for task in both) for scores in (dense, own))
    return Pair("Accuracy, mean over tasks", before, after), len(both)


def _accuracies(evidence: Evidence, name: str) -> dict[str, float]:
    """Task → accuracy of one model, normalised by length where lm-eval has that, as LLM-Pruner reports it."""
    tasks = [pair for measured in evidence.measured for pair in (measured.of(name).get("tasks") or {}).items()]
    return {task: values.get("acc_norm", values.get("acc")) for task, values in tasks if "acc" in values}


def _decode(evidence: Evidence) -> Pair | None:
    label = "Decoding, tokens/s"
    for bench in evidence.benches:
        rates = {model["name"]: model["decode"] for model in bench["cases"][0]["models"]}
        if DENSE in rates and evidence.name in rates:
            dense, own = (rates[name]["tokens_per_second"]["median"] for name in (DENSE, evidence.name))
            return Pair(label, dense, own, rates[evidence.name]["ideal"])
    return None


def sentence(subject: ReportSubject) -> str:
    """One sentence of plain text: what was won, and what was lost."""
    assert subject.evidence is not None
    known = figures(subject.evidence)
    won, lost = [], []
    if known.parameters is not None and known.weights is not None:
        won.append(
            f"{1 - known.parameters.ratio:.1%} of the decoder's parameters are gone "
            f"({count_text(known.parameters.dense)} → {count_text(known.parameters.pruned)}; all weights "
            f"{bytes_text(known.weights.dense)} → {bytes_text(known.weights.pruned)})"
        )
    if known.decode is not None:
        ideal = "" if known.decode.ideal is None else f", where its size allows {known.decode.ideal:.2f}"
        won.append(f"it decodes {known.decode.ratio:.2f} times as fast{ideal}")
    if known.perplexity is not None:
        where = f" on {known.text}" if known.text else ""
        rise = f"{known.perplexity.ratio - 1:+.0%}"
        after = "" if rise in ("+0%", "-0%") else f" ({rise})"
        lost.append(f"perplexity{where} {_change(known.perplexity, '.2f')}{after}")
    if known.tasks is not None:
        lost.append(f"accuracy over {counted(known.count, 'task')} {_change(known.tasks, '.1%')}")
    if not lost:
        lost.append("its quality was not measured")
    return f"{' and '.join(won)}; {', and '.join(lost)}."


def _change(pair: Pair, form: str) -> str:
    before, after = (format(value, form) for value in (pair.dense, pair.pruned))
    return f"went from {before} to {after}" if before != after else f"did not change ({before})"


class SummarySection(ReportSection):
    """Nothing without evidence."""

    name = "summary"
    summary = "what was won and lost: size, speed, quality"
    order = 0

    def render(self, subject: ReportSubject) -> str | None:
        if subject.evidence is None:
            return None
        known = figures(subject.evidence)
        shown: list[tuple[Pair | None, Callable[[float], str]]] = [
            (known.parameters, count_text),
            (known.weights, bytes_text),
            (known.decode, "{:,.1f}".format),
            (known.perplexity, "{:,.2f}".format),
            (known.tasks, "{:.1%}".format),
        ]
        tiles = [
            (pair.label, text(pair.pruned), text(pair.dense), f"{pair.ratio - 1:+.1%}".replace("-", "−"))
            for pair, text in shown
            if pair is not None
        ]
        return rendered("summary.html.j2", sentence=sentence(subject), tiles=tiles)
