"""The sections of how a checkpoint came about: ``recovery``, the losses of its trainings, and ``origin``, its commands,
plans, time, memory, machine and versions."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Any

from ..settings import PruneSettings, RecoverSettings, Settings, flag_of
from ..values import bytes_text, counted
from .base import ReportSection, ReportSubject, bare, rendered
from .chart import Chart, Point, Series, drawn

_MODELS: Mapping[str, type[Settings]] = {"prune": PruneSettings, "recover": RecoverSettings}

_MOST_POINTS = 400
"""Of a curve; of longer trainings, neighbouring steps are averaged."""


class RecoverySection(ReportSection):
    """A drawing of the losses for each training; nothing for a model that was not trained."""

    name = "recovery"
    summary = "the losses of every training that restored quality"
    order = 25

    def render(self, subject: ReportSubject) -> str | None:
        done = [one for one in subject.record.get("recovery") or () if one["losses"]]
        trainings = [(one, loss_text(one), loss_curve(one)) for one in done]
        return rendered("recovery.html.j2", trainings=trainings) if done else None


def loss_curve(training: Mapping[str, Any]) -> str:
    """A drawing (SVG) of the loss over optimizer steps, and, where it was measured, of the validation loss.

    ``training``: an element of ``recovery`` in ``llmpruner.json``, with at least one loss.
    """
    losses = _averaged([(step, float(loss)) for step, loss in enumerate(training["losses"], start=1)])
    series = [Series("loss", tuple(losses), accent=True)]
    if validation := training.get("validation"):
        points = (
            Point(check["step"], check["loss"], f"step {check['step']}: {check['loss']:.3f}") for check in validation
        )
        series.append(Series("validation loss", tuple(points)))
    chart = Chart("Loss over optimizer steps", "optimizer steps", "loss", tuple(series), height=300)
    return drawn(chart, standalone=True)


def _averaged(losses: Sequence[tuple[int, float]]) -> Iterator[Point]:
    size = ceil(len(losses) / _MOST_POINTS)
    for first in range(0, len(losses), size):
        part = losses[first : first + size]
        yield Point(sum(step for step, _ in part) / len(part), sum(loss for _, loss in part) / len(part))


class OriginSection(ReportSection):
    """Nothing without evidence."""

    name = "origin"
    summary = "how the checkpoint was made: commands, plans, seconds and memory of every stage, machine, versions"
    order = 40

    def render(self, subject: ReportSubject) -> str | None:
        evidence = subject.evidence
        if evidence is None:
            return None
        runs = [(command_of(run), _stages(run)) for run in evidence.runs]
        places = list(dict.fromkeys((_machine(run["machine"]), _versions(run["versions"])) for run in evidence.runs))
        plans = [_facts(plan) for plan in subject.record.get("plans") or ()]
        return rendered("origin.html.j2", runs=runs, places=places, plans=plans, steps=evidence.steps)


def command_of(run: Mapping[str, Any]) -> str:
    """The command line with which the same is done again, but for the output."""
    words = ["llmpruner", run["command"], bare(run["model"])]
    model = _MODELS[run["command"]]
    for name, value in run["settings"].items():
        words += _option("--plan" if name == "plan" else flag_of(model, name), value)
    return " ".join(shlex.quote(str(word)) for word in words) + " -o …"


def _option(flag: str, value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield flag if value else f"--no-{flag[2:]}"
    elif isinstance(value, Mapping):
        for component, settings in value.items():
            for key, one in settings.items():
                yield from ("--set", f"{component}.{key}={one}")
    elif isinstance(value, list | tuple):
        yield from _option(flag, ",".join(map(str, value)))
    elif value is not None and flag.startswith("--set "):
        yield from ("--set", f"{flag.removeprefix('--set ')}={value}")
    elif value is not None:
        yield from (flag, bare(str(value)))


def _stages(run: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    stages = [one for one in run["stages"] if one["seconds"] >= 0.05]
    rows = [(one["name"], f"{one['seconds']:,.1f}", _memory(one["peak_bytes"])) for one in stages]
    return [*rows, ("all", f"{sum(one['seconds'] for one in run['stages']):,.1f}", "")]


def _memory(value: int | None) -> str:
    return "–" if value is None else bytes_text(value)


def _machine(machine: Mapping[str, Any]) -> str:
    cores, memory = counted(machine["cores"], "core"), bytes_text(machine["memory"])
    return f"{machine['processor'] or 'unknown processor'}, {cores}, {memory} of memory, {machine['system']}"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _facts(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    target, selection, estimation = plan["target"], plan["selection"], plan["estimation"]
    compensation = plan["compensation"] or {"name": "none"}
    text = estimation["calibration"] or compensation.get("calibration")
    return [
        ("Model", f"{bare(plan['base']['model'])}, family {plan['family']}"),
        ("Asked for", _asked(target)),
        ("Criterion", f"{estimation['criterion']} {_settings(estimation['settings'])}".strip()),
        ("Calibration", "none" if text is None else bare(text)),
        ("Units", f"{', '.join(selection['kinds'])} of the layers {selection['layers']}"),
        ("Allocation", f"{selection['allocation']}, {selection['shape']} widths, multiples of {selection['round_to']}"),
        ("Compensation", f"{compensation['name']} {_settings(compensation.get('settings') or {})}".strip()),
        ("Seed", str(plan["seed"])),
    ]  # fmt: skip


def _asked(target: Mapping[str, Any]) -> str:
    if target["by"] == "parameters":
        return f"{target['amount']:,.0f} parameters to keep"
    of = target["budget"] if target["by"] == "ratio" else "the units of every group"
    return f"{target['amount']:.1%} of {of}"


def _settings(values: Mapping[str, Any]) -> str:
    return f"({', '.join(f'{key} {_value(value)}' for key, value in values.items())})" if values else ""


def _value(value: Any) -> str:
    if value is None or value == []:
        return "none"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def first_and_last(record: Mapping[str, Any]) -> tuple[str, float, float] | None:
    """What was measured, its value before the training, and that of the result: of rows that were not trained on, if
    there were any; else of the steps. None for a training without losses.

    ``record``: an entry of ``recovery`` in ``llmpruner.json``."""
    checked = [float(one["loss"]) for one in record.get("validation") or ()]
    if checked:
        what = "held-out loss" if record.get("held_out", True) else "loss on examples"
        return what, checked[0], min(checked)
    losses = record.get("losses")
    return ("loss", losses[0], losses[-1]) if losses else None


def loss_text(record: Mapping[str, Any]) -> str:
    """``held-out loss 2.500 → 1.250``; empty for a training without losses."""
    measured = first_and_last(record)
    return "" if measured is None else f"{measured[0]} {measured[1]:.3f} → {measured[2]:.3f}"


def no_better(record: Mapping[str, Any]) -> str | None:
    """A line for a training after which no loss was lower than before it; None for others."""
    if record.get("best_step") != 0 or not record.get("losses"):
        return None
    checked = record["validation"]
    return (
        f"no better than before: the loss went from {checked[0]['loss']:.3f} to {checked[-1]['loss']:.3f} in "
        f"{len(record['losses'])} steps, so the weights are those of the start; lower --learning-rate, or give more "
        "data or steps"
    )
