"""The sections about one checkpoint: what was measured, and what was done to the model. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

from pydantic import TypeAdapter

from ..evaluation.evaluate import Evaluations
from ..values import bytes_text, count_text, counted, without_folders
from .base import DENSE, ReportSection, ReportSubject, rendered
from .chart import Point, Series, drawn

SPEED_COLUMNS = ("Batch", "Prompt", "Model", "Tokens/s (quartiles)", "Speed-up", "Ideal", "Reached")


class QualitySection(ReportSection):
    name = "quality"
    summary = "perplexity, divergence and tasks of dense and pruned models"
    order = 11

    def render(self, subject: ReportSubject) -> str | None:
        better = {True: "higher", False: "lower", None: ""}
        tables = []
        for measured in subject.measured:
            columns = ("Measured", *(each.name for each in measured), "Better")
            rows = [(line.label, *line.cells, better[line.higher_is_better]) for line in measured.lines]
            tables.append((columns, rows, _texts(measured)))
        # Texts of an earlier plan count: the weights that it fitted are in the model.
        parts = [part for plan in subject.plans for part in (plan.estimation, plan.compensation)]
        read = dict.fromkeys(without_folders(part.calibration) for part in parts if part and part.calibration)
        return rendered(
            "quality.html.j2", tables=tables, calibration=", ".join(read), name=subject.name, cut=subject.cut_quality
        )


def _texts(measured: Evaluations) -> str:
    """What the perplexity was measured on."""
    perplexities = [each.results["perplexity"] for each in measured if "perplexity" in each.results]
    if not perplexities:
        return ""
    first = perplexities[0]
    results = {first["text"]: first, **first["others"]}.items()
    texts = "; ".join(f"{counted(result['tokens'], 'token')} of {without_folders(text)}" for text, result in results)
    window, predicted = counted(first["window"], "token"), counted(first["window"] - 1, "prediction")
    rates = {round(tokens_per_byte(result), 6) for result in perplexities}
    differ = " It is per token, and the tokens differ between models: compare bits per byte." if len(rates) > 1 else ""
    return f"Perplexity: {texts}; windows of {window} with {predicted} each.{differ}"


def tokens_per_byte(result: Mapping[str, Any]) -> float:
    """But for a constant factor."""
    return float(result["bits_per_byte"] / result["nll_per_token"])


class AnswersSection(ReportSection):
    name = "answers"
    summary = "the same prompts answered side by side"
    order = 12

    def render(self, subject: ReportSubject) -> str | None:
        return rendered("answers.html.j2", asked=subject.answers) if subject.answers else None

    def compare(self, subjects: Sequence[ReportSubject]) -> str | None:
        asked: dict[str, dict[str, Mapping[str, str]]] = {}
        for subject in subjects:
            for answer in chain.from_iterable(subject.answers):
                if answer["name"] in (DENSE, subject.name):
                    asked.setdefault(answer["prompt"], {}).setdefault(answer["name"], answer)
        return rendered("answers.html.j2", asked=[[*by.values()] for by in asked.values()]) if asked else None


class CostSection(ReportSection):
    name = "cost"
    summary = "parameters, bytes, operations and cache before and after, and measured speed next to the ideal"
    order = 14

    def render(self, subject: ReportSubject) -> str | None:
        dense, pruned = subject.dense, subject.costs
        pairs: list[tuple[str, float | None, float | None, Any]] = [
            ("Parameters", dense.parameters, pruned.parameters, count_text),
            ("Parameters of the decoder", dense.decoder_parameters, pruned.decoder_parameters, count_text),
            ("Weights in memory", dense.weight_bytes, pruned.weight_bytes, bytes_text),
            ("Files", dense.file_bytes, pruned.file_bytes, bytes_text),
            ("As a GGUF file of type q4_0", dense.q4_bytes, pruned.q4_bytes, bytes_text),
            ("MACs per token", dense.macs_per_token, pruned.macs_per_token, count_text),
            ("KV cache per token, bytes", dense.cache_bytes, pruned.cache_bytes, "{:,}".format),
        ]
        rows = [
            # A state space model has no keys and values, of which nothing can be removed.
            (label, text(before), text(after), f"{1 - after / before:.1%}".replace("-", "−") if before else "–")
            for label, before, after, text in pairs
            if before is not None and after is not None
        ]
        benches = []
        for bench in subject.benches:
            named = (("Prefill", "prefill"), ("Decoding", "decode"))
            benches.append((bench, [(title, *cells) for title, key in named for cells in speed_rows(bench, key)]))
        return rendered(
            "cost.html.j2", rows=rows, benches=benches, columns=("Stage", *SPEED_COLUMNS), name=subject.name,
            context=pruned.context,
        )  # fmt: skip


def speed_rows(bench: Mapping[str, Any], stage: str) -> Iterator[tuple[str, ...]]:
    """Cells of `SPEED_COLUMNS` for every case and model of a bench. ``stage``: ``prefill`` or ``decode``."""
    for case in bench["cases"]:
        for model in case["models"]:
            rate = model[stage]
            speed, ideal, share = rate["tokens_per_second"], rate["ideal"], rate["share_of_ideal"]
            speeds = (speed["median"], speed["lower_quartile"], speed["upper_quartile"])
            median, lower, upper = (f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in speeds)
            yield (
                str(case["batch"]), str(case["prompt_tokens"]), model["name"], f"{median} ({lower}–{upper})",
                f"{rate['speedup']['median']:.2f}", "–" if ideal is None else f"{ideal:.2f}",
                "–" if share is None else f"{share:.0%}",
            )  # fmt: skip


class PlanSection(ReportSection):
    name = "plan"
    summary = "what was cut: units kept of each kind in each layer"
    order = 20

    def render(self, subject: ReportSubject) -> str:
        from ..structure.outcome import TokenOutcome

        plans = []
        for plan, work in zip(subject.plans, chain(subject.record.get("work", ()), repeat({})), strict=False):
            kinds, rows = plan.table()
            tables = [("Units kept", ("Layers", *kinds), rows, 1)]
            if "tokens" in work:
                tables.append(("Tokens that go", *TypeAdapter(TokenOutcome).validate_python(work["tokens"]).table(), 2))
            plans.append(tables)
        return rendered("plan.html.j2", plans=plans)


class RecoverySection(ReportSection):
    name = "recovery"
    summary = "the losses of every training that restored quality"
    order = 25

    def render(self, subject: ReportSubject) -> str | None:
        curves = []
        for training in (each for each in subject.record.get("recovery", ()) if each["losses"]):
            points = tuple(Point(step, loss) for step, loss in enumerate(training["losses"], 1))
            series = [Series("loss", points, accent=True)]
            if checks := training["validation"]:
                marks = (Point(at["step"], at["loss"], f"step {at['step']}: {at['loss']:.3f}") for at in checks)
                series.append(Series("validation loss", tuple(marks)))
            curve = drawn("Loss over optimizer steps", "optimizer steps", "loss", series, height=300)
            curves.append((training, verdict(training), curve))
        return rendered("recovery.html.j2", trainings=curves) if curves else None


class OriginSection(ReportSection):
    name = "origin"
    summary = "how the checkpoint was made: settings, plans, seconds and memory of every stage, machine, versions"
    order = 40

    def render(self, subject: ReportSubject) -> str:
        runs = []
        for run in subject.runs:
            settings = dict(run["settings"])
            for name, values in settings.pop("settings", {}).items():
                settings |= {f"{name}.{key}": value for key, value in values.items()}
            measured = [(stage["name"], stage["seconds"], stage["peak_bytes"]) for stage in run["stages"]]
            stages = [(name, f"{s:,.1f}", "–" if peak is None else bytes_text(peak)) for name, s, peak in measured]
            total = run.get("seconds", 0) or sum(seconds for _, seconds, _ in measured)
            stages.append(("from start to end", f"{total:,.1f}", ""))
            runs.append((run, settings, stages))
        steps = [(step["name"], step["command"], f"{step['seconds']:,.1f}") for step in subject.steps]
        return rendered("origin.html.j2", runs=runs, plans=subject.record["plans"], steps=steps)


def first_and_last(training: Mapping[str, Any]) -> tuple[str, float, float] | None:
    """The name of the loss, its value before and after a training, on validation rows if there are any; or None."""
    if checked := training["validation"]:
        what = "held-out loss" if training["held_out"] else "loss on examples"
        return what, checked[0]["loss"], {check["step"]: check["loss"] for check in checked}[training["best_step"]]
    losses = training["losses"]
    return ("loss", losses[0], losses[-1]) if losses else None


def loss_text(training: Mapping[str, Any]) -> str:
    """``held-out loss 2.500 → 1.250``; of a training that was undone, why."""
    if training["best_step"] == 0:
        start, end = training["validation"][0], training["validation"][-1]
        loss = (
            f"from {start['loss']:.4f} to {end['loss']:.4f} (± {end['error']:.4f}) in {len(training['losses'])} steps"
        )
        hint = "so the weights are those of the start; lower --learning-rate, or give more data or steps"
        return f"no better than before: the loss went {loss}, {hint}"
    if (measured := first_and_last(training)) is None:
        return "no loss measured"
    what, first, last = measured
    return f"{what} {first:.3f} → {last:.3f}"


def training_facts(training: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says of the training of a step. ``losses``: those of `first_and_last`."""
    facts = {key: training[key] for key in ("strategy", "data", "examples", "trainable_parameters", "improved")}
    losses = list(first_and_last(training) or ())[1:]
    return {**facts, "steps": len(training["losses"]), "losses": losses, "loss": loss_text(training)}


def verdict(training: Mapping[str, Any]) -> str:
    """Whether a training helped, in one sentence."""
    text = loss_text(training)
    if training["best_step"] == 0:
        return f"Recovery did not help and was undone: {text.partition(': ')[2]}."
    if training["validation"] and training["held_out"]:
        return f"Recovery helped: {text}."
    return f"Whether recovery helped was not measured, as no rows were held out: {text}."
