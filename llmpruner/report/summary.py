"""The sections ``summary``, figures next to the dense model's, and ``comparison`` of several. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean
from typing import Any

from ..structure.coupling import MLP, VOCABULARY
from ..values import bytes_text, count_text, counted, without_folders
from .base import DENSE, ReportSection, ReportSubject, rendered
from .chart import Point, Series, drawn
from .sections import tokens_per_byte, verdict

_DASHES = ("", "6 4", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Pair:
    """One figure of the dense model and of the pruned one. ``text``: formats it; ``note``: of what it is. ``on``: the
    hash of the text that was measured on, and the window; only figures on the same are compared."""

    label: str
    dense: float
    pruned: float
    text: Callable[[float], str]
    note: str = ""
    on: tuple[Any, ...] = ()

    @property
    def ratio(self) -> float:
        return self.pruned / self.dense

    @property
    def change(self) -> str:
        before, after = self.text(self.dense), self.text(self.pruned)
        return f"went from {before} to {after}" if before != after else f"did not change ({before})"


def figures(subject: ReportSubject) -> dict[str, Pair]:
    """``parameters``, ``weights`` and, where both models were measured, ``decode``, ``perplexity`` and ``tasks``."""
    dense, cut = subject.dense, subject.costs
    decoder = Pair("Parameters of the decoder", dense.decoder_parameters, cut.decoder_parameters, count_text)
    weights = Pair("Weights in memory", dense.weight_bytes, cut.weight_bytes, bytes_text)
    pairs = {"parameters": decoder, "weights": weights}
    for bench in subject.benches:
        models = {model["name"]: model["decode"] for model in bench["cases"][0]["models"]}
        if {DENSE, subject.name} <= models.keys():
            rates = [models[name] for name in (DENSE, subject.name)]
            before, after = (rate["tokens_per_second"]["median"] for rate in rates)
            ideals = [rate["ideal"] for rate in rates]  # next to the first model, which may be another
            note = "" if None in ideals else f", where its size allows {ideals[1] / ideals[0]:.2f}"
            pairs.setdefault("decode", Pair("Decoding, tokens/s", before, after, "{:,.1f}".format, note))
    for measured in subject.measured:
        first, second = (measured.of(name).get("perplexity", {}) for name in (DENSE, subject.name))
        if first.get("perplexity") is not None and second.get("perplexity") is not None:
            more = round(tokens_per_byte(second) / tokens_per_byte(first), 6)
            note = f" on {without_folders(first['text'])}{' (per token of the dense model)' if more != 1 else ''}"
            before, after = first["perplexity"], second["perplexity"] ** more
            on = (second.get("text_sha256"), second["window"])
            pairs.setdefault("perplexity", Pair("Perplexity", before, after, "{:,.2f}".format, note, on))
    both = _accuracies(subject, DENSE), _accuracies(subject, subject.name)
    if tasks := [task for task in both[0] if task in both[1]]:
        before, after = (fmean(accuracies[task] for task in tasks) for accuracies in both)
        note = f" over {counted(len(tasks), 'task')}"
        pairs["tasks"] = Pair("Accuracy, mean over tasks", before, after, "{:.1%}".format, note)
    return pairs


def _accuracies(subject: ReportSubject, name: str) -> dict[str, float]:
    """Task → accuracy of one model, normalised by length where lm-eval has that, as LLM-Pruner reports it."""
    tasks = [pair for measured in subject.measured for pair in measured.of(name).get("tasks", {}).items()]
    return {task: values.get("acc_norm", values.get("acc")) for task, values in tasks if "acc" in values}


def sentence(subject: ReportSubject) -> str:
    """Plain text: what was won, what was lost, and whether the last recovery helped."""
    pairs = figures(subject)
    parameters, weights = pairs["parameters"], pairs["weights"]
    won = [
        f"{1 - weights.ratio:.1%} of the weights are gone ({bytes_text(weights.dense)} → {bytes_text(weights.pruned)})"
        if weights.ratio < parameters.ratio  # where tokens went
        else f"{1 - parameters.ratio:.1%} of the decoder's parameters are gone ({count_text(parameters.dense)} → "
        f"{count_text(parameters.pruned)}; all weights {bytes_text(weights.dense)} → {bytes_text(weights.pruned)})"
    ]
    lost = []
    if decode := pairs.get("decode"):
        won.append(f"it decodes {decode.ratio:.2f} times as fast{decode.note}")
    if perplexity := pairs.get("perplexity"):
        lost.append(f"perplexity{perplexity.note} {perplexity.change} ({perplexity.ratio - 1:+.0%})")
    if tasks := pairs.get("tasks"):
        lost.append(f"accuracy{tasks.note} {tasks.change}")
    if not lost and (quality := subject.cut_quality):
        lost.append(f"{quality}{', before it was trained' if subject.recovered else ''}")
    text = f"{' and '.join(won)}; {', and '.join(lost) or 'its quality was not measured'}."
    return f"{text} {verdict(subject.record['recovery'][-1])}" if subject.recovered else text


LEVELS = (
    (1.02, "as good as the dense model on"), (1.1, "slightly worse on"), (1.25, "worse on"), (inf, "much worse on"),
)  # fmt: skip
"""Bits per byte, as multiples of the dense model's, up to which these words hold."""


def in_words(subject: ReportSubject) -> str:
    """What the model is good for: on which texts it is how much worse, the best first; empty where none is measured."""
    ratios: dict[str, float] = {}
    for measured in subject.measured:
        first, second = (_texts_of(measured.of(name).get("perplexity", {})) for name in (DENSE, subject.name))
        ratios |= {without_folders(text): second[text] / first[text] for text in first if text in second}
    said: dict[str, list[str]] = {}
    for text, ratio in sorted(ratios.items(), key=lambda item: item[1]):
        words = next(words for limit, words in LEVELS if ratio <= limit)
        said.setdefault(words, []).append(f"{text} ({ratio - 1:+.0%} bits per byte)")
    return "; ".join(f"{words} {', '.join(texts)}" for words, texts in said.items())


def _texts_of(perplexity: Mapping[str, Any]) -> dict[str, float]:
    """Text → bits per byte."""
    every = {perplexity.get("text"): perplexity, **perplexity.get("others", {})}
    return {text: values["bits_per_byte"] for text, values in every.items() if values.get("bits_per_byte")}


class SummarySection(ReportSection):
    name = "summary"
    summary = "what was won and lost: size, speed, quality"
    order = 0

    def render(self, subject: ReportSubject) -> str:
        said, words = sentence(subject), in_words(subject)
        return rendered("summary.html.j2", sentence=said, words=words, pairs=figures(subject).values())


class ComparisonSection(ReportSection):
    name = "comparison"
    summary = "several checkpoints: quality against size, the best of each size, a table"
    order = 1

    def render(self, subject: ReportSubject) -> None:
        """Nothing about one checkpoint."""

    def compare(self, subjects: Sequence[ReportSubject]) -> str:
        pairs = {subject.name: figures(subject) for subject in subjects}
        measured = {name: of_model["perplexity"] for name, of_model in pairs.items() if "perplexity" in of_model}
        on = next((each.on for each in measured.values()), ())
        places = {n: (pairs[n]["weights"].pruned, each.pruned) for n, each in measured.items() if each.on == on}

        def beaten(place: tuple[float, float]) -> bool:
            return any(other != place and other[0] <= place[0] and other[1] <= place[1] for other in places.values())

        best = [name for name, place in places.items() if not beaten(place)]
        rows = [_dense_row(subjects[0], pairs[subjects[0].name])]
        rows += [_row(subject, pairs[subject.name], on) for subject in subjects]
        # The table is wide: without the columns that are known of no pruned model.
        known = [column for column in rows[1] if any(row.get(column) is not None for row in rows[1:])]
        methods = {subject.name: method_of(subject) for subject in subjects if subject.name in places}
        verdicts = [(subject.name, words) for subject in subjects if (words := in_words(subject))]
        return rendered(
            "comparison.html.j2", rows=[[row.get(column) or "–" for column in known] for row in rows], best=best,
            columns=known, picture=_chart(pairs, methods, best) if places else None, verdicts=verdicts,
        )  # fmt: skip


def method_of(subject: ReportSubject) -> str:
    """``best``, ``fast, recovered``, ``taylor``, ``output-energy + refit``, and kinds that are not the usual ones."""
    plan = subject.plans[-1]
    made = next((run["settings"] for run in reversed(subject.runs) if run["command"] == "prune"), {"plan": ""})
    name = " + ".join([plan.estimation.criterion, *([plan.compensation.name] if plan.compensation else [])])
    if not {"importance", "compensate", "plan"} & made.keys() and plan.selection.kinds != (VOCABULARY,):
        name = made.get("method", "best")
    kinds = "" if plan.selection.kinds == (MLP,) else f", {' and '.join(plan.selection.kinds)}"
    return f"{name}{kinds}{', recovered' if subject.recovered else ''}"


def _dense_row(subject: ReportSubject, pairs: Mapping[str, Pair]) -> dict[str, str | None]:
    """The row of the dense model of ``subject``, with the columns that it has."""
    cells = {name: pair.text(pair.dense) for name, pair in pairs.items()}
    q4 = subject.dense.q4_bytes
    return {
        "Model": DENSE, "Decoder": cells["parameters"], "In memory": cells["weights"],
        "As q4_0": bytes_text(q4) if q4 else None, "Perplexity": cells.get("perplexity"),
        "Accuracy": cells.get("tasks"),
    }  # fmt: skip


def _row(subject: ReportSubject, pairs: Mapping[str, Pair], on: tuple[Any, ...]) -> dict[str, str | None]:
    """Column → text; None where it is not known. ``on``: that of the chart."""
    cells = {name: pair.text(pair.pruned) for name, pair in pairs.items()}
    if (perplexity := pairs.get("perplexity")) is not None and perplexity.on != on:
        cells["perplexity"] += perplexity.note
    divergence = None
    for measured in subject.measured:
        of_dense, value = (measured.of(n).get("perplexity", {}).get("kl_per_token") for n in (DENSE, subject.name))
        if of_dense == 0 and divergence is None:  # the others were compared with it
            divergence = value
    cut = None if subject.recovered else subject.cut_quality
    decode, q4 = pairs.get("decode"), subject.costs.q4_bytes
    return {
        "Model": subject.name,
        "Method": method_of(subject),
        "Decoder": cells["parameters"],
        "Removed": f"{1 - pairs['parameters'].ratio:.1%}",
        "In memory": cells["weights"],
        "As q4_0": bytes_text(q4) if q4 else None,
        "Perplexity": cells.get("perplexity"),
        "KL": None if divergence is None else f"{divergence:.4f}",
        "KL of the cut": None if divergence is not None or cut is None else f"{cut.kl_per_token:.4f}",
        "Accuracy": cells.get("tasks"),
        "Speed-up": None if decode is None else f"{decode.ratio:.2f}",
    }


def _chart(pairs: Mapping[str, Mapping[str, Pair]], methods: Mapping[str, str], best: Sequence[str]) -> str:
    """Perplexity against the bytes of the weights, a line for each method, and the dense model."""
    lines: dict[str, list[Point]] = {}
    for name, method in methods.items():
        size, perplexity = pairs[name]["weights"].pruned, pairs[name]["perplexity"].pruned
        note = f"{name}: {bytes_text(size)} of weights, perplexity {perplexity:.2f}"
        note += ", best of its size" if name in best else ""
        lines.setdefault(method, []).append(Point(size / 2**20, perplexity, note, name, ring=name in best))
    series = []
    for number, (method, points) in enumerate(lines.items()):
        line = tuple(sorted(points, key=lambda p: p.x))
        series.append(Series(method, line, accent=number == 0, dashes=_DASHES[number % 4]))
    first = pairs[next(iter(methods))]
    dense = first["perplexity"].dense
    point = Point(first["weights"].dense / 2**20, dense, f"dense: perplexity {dense:.2f}", DENSE)
    perplexities = [point.y for points in lines.values() for point in points]
    return drawn(
        "Perplexity against size: a point for each model, a line for each method", "MiB of weights in memory",
        f"perplexity{first['perplexity'].note}", [*series, Series("", (point,))],
        log=max(perplexities) > 5 * min(perplexities), width=820, height=400,
    )  # fmt: skip
