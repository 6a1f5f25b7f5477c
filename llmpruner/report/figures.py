"""The figures by which a checkpoint is judged: size, speed and quality beside the dense model's. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..amounts import bytes_text, count_text, counted
from .base import DENSE, Evidence, ReportSubject
from .templates import bare


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
    for one in evidence.measured:
        before, after = ((one.of(name).get("perplexity") or {}).get("perplexity") for name in (DENSE, evidence.name))
        if before is not None and after is not None:
            return Pair("Perplexity", before, after), bare(one.text_of(one.of(DENSE)["perplexity"]))
    return None, None


def _tasks(evidence: Evidence) -> tuple[Pair | None, int]:
    found = [_accuracies(evidence, name) for name in (DENSE, evidence.name)]
    both = [task for task in found[0] if task in found[1]]
    if not both:
        return None, 0
    before, after = (sum(values[task] for task in both) / len(both) for values in found)
    return Pair("Accuracy, mean over tasks", before, after), len(both)


def _accuracies(evidence: Evidence, name: str) -> dict[str, float]:
    """Task → accuracy of one model, normalised by length where lm-eval has that, as LLM-Pruner reports it."""
    tasks: list[tuple[str, Mapping[str, Any]]] = [
        pair for one in evidence.measured for pair in (one.of(name).get("tasks") or {}).items()
    ]
    found = {task: values.get("acc_norm", values.get("acc")) for task, values in tasks}
    return {task: value for task, value in found.items() if value is not None}


def _decode(evidence: Evidence) -> Pair | None:
    for bench in evidence.benches:
        models = {one["name"]: one["decode"] for one in bench["cases"][0]["models"]}
        if DENSE in models and evidence.name in models:
            own = models[evidence.name]
            before, after = (models[name]["tokens_per_second"]["median"] for name in (DENSE, evidence.name))
            return Pair("Decoding, tokens/s", before, after, own["ideal"])
    for measured in evidence.measured:
        before, after = (measured.of(name).get("speed") for name in (DENSE, evidence.name))
        if before and after:
            return Pair("Decoding, tokens/s", before["decode"]["median"], after["decode"]["median"])
    return None


def sentence(subject: ReportSubject) -> str:
    """One sentence of plain text: what was won, and what was lost."""
    assert subject.evidence is not None
    found = figures(subject.evidence)
    won, lost = [], []
    if found.parameters is not None and found.weights is not None:
        won.append(
            f"{1 - found.parameters.ratio:.1%} of the decoder's parameters are gone "
            f"({count_text(found.parameters.dense)} → {count_text(found.parameters.pruned)}; all weights "
            f"{bytes_text(found.weights.dense)} → {bytes_text(found.weights.pruned)})"
        )
    if found.decode is not None:
        ideal = "" if found.decode.ideal is None else f", where its size allows {found.decode.ideal:.2f}"
        won.append(f"it decodes {found.decode.ratio:.2f} times as fast{ideal}")
    if found.perplexity is not None:
        where = f" on {found.text}" if found.text else ""
        rise = f"{found.perplexity.ratio - 1:+.0%}"
        after = "" if rise in ("+0%", "-0%") else f" ({rise})"
        lost.append(f"perplexity{where} {_change(found.perplexity, '.2f')}{after}")
    if found.tasks is not None:
        lost.append(f"accuracy over {counted(found.count, 'task')} {_change(found.tasks, '.1%')}")
    if not lost:
        lost.append("its quality was not measured")
    return f"{' and '.join(won)}; {', and '.join(lost)}."


def _change(pair: Pair, form: str) -> str:
    before, after = (format(value, form) for value in (pair.dense, pair.pruned))
    return f"went from {before} to {after}" if before != after else f"did not change ({before})"
