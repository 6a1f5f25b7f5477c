"""The sections of what was done to a model: ``plan``, kept units of every layer; ``recovery``, losses of trainings;
``origin``, settings, time, memory and versions."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, repeat
from typing import Any

from .base import ReportSection, ReportSubject, rendered
from .chart import Point, Series, drawn


class PlanSection(ReportSection):
    """A table for each plan."""

    name = "plan"
    summary = "what was cut: units kept of each kind in each layer"
    order = 20

    def render(self, subject: ReportSubject) -> str:
        from pydantic import TypeAdapter

        from ..structure.plan import TokenOutcome

        plans = []
        for plan, work in zip(subject.plans, chain(subject.record.get("work", ()), repeat({})), strict=False):
            kinds, rows = plan.table()
            tables = [("Units kept", ("Layers", *kinds), rows, 1)]
            if "tokens" in work:
                tables.append(("Tokens that go", *TypeAdapter(TokenOutcome).validate_python(work["tokens"]).table(), 2))
            plans.append(tables)
        return rendered("plan.html.j2", plans=plans)


class RecoverySection(ReportSection):
    """A drawing of the losses for each training; nothing for a model that was not trained."""

    name = "recovery"
    summary = "the losses of every training that restored quality"
    order = 25

    def render(self, subject: ReportSubject) -> str | None:
        curves = [(each, verdict(each), loss_curve(each)) for each in trainings(subject.record)]
        return rendered("recovery.html.j2", trainings=curves) if curves else None


def trainings(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those that took steps, oldest first."""
    return [training for training in record.get("recovery") or () if training["losses"]]


def loss_curve(training: Mapping[str, Any]) -> str:
    """An SVG of a training's losses. ``training``: an element of ``recovery`` in ``llmpruner.json``."""
    points = tuple(Point(step, loss) for step, loss in enumerate(training["losses"], 1))
    series = [Series("loss", points, accent=True)]
    if validation := training.get("validation"):
        checks = (
            Point(check["step"], check["loss"], f"step {check['step']}: {check['loss']:.3f}") for check in validation
        )
        series.append(Series("validation loss", tuple(checks)))
    return drawn("Loss over optimizer steps", "optimizer steps", "loss", series, height=300)


class OriginSection(ReportSection):
    """Runs with their settings, stages and machines, plans, and the steps of a recipe."""

    name = "origin"
    summary = "how the checkpoint was made: settings, plans, seconds and memory of every stage, machine, versions"
    order = 40

    def render(self, subject: ReportSubject) -> str:
        runs = [(run, _listed(run["settings"])) for run in subject.runs]
        return rendered("origin.html.j2", runs=runs, plans=subject.record["plans"], steps=subject.steps)


def _listed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with those of components under names such as ``vocabulary.tokens``."""
    of_components = settings.get("settings", {}).items()
    own = {f"{name}.{key}": value for name, values in of_components for key, value in values.items()}
    return {**{key: value for key, value in settings.items() if key != "settings"}, **own}


def first_and_last(training: Mapping[str, Any]) -> tuple[str, float, float] | None:
    """What was measured, its value before the training, and that of the result: of rows that were not trained on, if
    there were any; else of the steps. None for a training without losses. ``training``: as of `loss_curve`."""
    if checked := training.get("validation"):
        what = "held-out loss" if training.get("held_out", True) else "loss on examples"
        return what, checked[0]["loss"], {check["step"]: check["loss"] for check in checked}[training["best_step"]]
    losses = training.get("losses")
    return ("loss", losses[0], losses[-1]) if losses else None


def loss_text(training: Mapping[str, Any]) -> str:
    """``held-out loss 2.500 → 1.250``; empty for a training without losses."""
    measured = first_and_last(training)
    return "" if measured is None else f"{measured[0]} {measured[1]:.3f} → {measured[2]:.3f}"


def verdict(training: Mapping[str, Any]) -> str:
    """Whether a training with losses helped, in one sentence."""
    if failed := no_better(training):
        return f"Recovery did not help and was undone: {failed.partition(': ')[2]}."
    held = training.get("validation") and training.get("held_out", True)
    helped = "Recovery helped" if held else "Whether recovery helped was not measured, as no rows were held out"
    return f"{helped}: {loss_text(training)}."


def no_better(training: Mapping[str, Any]) -> str | None:
    """A line for a training after which no loss was lower than before it; None for others."""
    if training.get("best_step") != 0 or not training.get("losses"):
        return None
    checked = training["validation"]
    return (
        f"no better than before: the loss went from {checked[0]['loss']:.4f} to {checked[-1]['loss']:.4f} "
        f"(± {checked[-1].get('error', 0):.4f}) in {len(training['losses'])} steps, so the weights are those of the "
        "start; lower --learning-rate, or give more data or steps"
    )
