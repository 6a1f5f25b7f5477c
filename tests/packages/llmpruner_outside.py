"""A package with a component of every kind but readers, written with public names alone; the tutorial has a reader."""

import inspect
import re
import textwrap
from html import escape

import torch
import typer
from pydantic import Field

from llmpruner import (
    Allocation,
    Budget,
    CalibrationSource,
    Compensation,
    ComponentSettings,
    DataError,
    Exporter,
    ImportanceCriterion,
    Method,
    Metric,
    ModelFamily,
    OutputError,  # noqa: F401 - in an example
    RecoveryStrategy,
    ReportSection,
    Role,
    Runtime,
    Session,
    SizeModel,
    TrainingResult,
    WeightCost,
    hookimpl,
    top_up,
    work_of,  # noqa: F401 - in an example
)


def fit(*arguments):
    from llmpruner import fit  # takes seconds to import

    return fit(*arguments)


# The examples in the reference of hooks, as their readers would type them.
for base in (ImportanceCriterion, Metric, Exporter, Session, Runtime, RecoveryStrategy):
    example = re.search(r"::\n\n((?:(?: {4}.*)?\n)+)", f"{inspect.cleandoc(base.__doc__)}\n")[1]
    exec(textwrap.dedent(example))


class Tapered(Allocation):
    name = "tapered"
    summary = "shares that grow evenly from the first layer to the last"
    equal_shares = True

    class Settings(ComponentSettings):
        slope: float = Field(0.5, ge=0, le=1, description="How much more than the mean the last layer gives.")

    settings: Settings

    def allocate(self, task):
        layers = [queue.group.layer or 0 for queue in task.queues]
        middle, half = (max(layers) + min(layers)) / 2, max((max(layers) - min(layers)) / 2, 1)

        def at(share):
            return {
                queue.group.name: queue.steps_for(
                    share * queue.group.units * (1 + self.settings.slope * (layer - middle) / half)
                )
                for queue, layer in zip(task.queues, layers, strict=True)
            }

        low, high = 0.0, 1.0
        for _ in range(40):
            share = (low + high) / 2
            low, high = (share, high) if task.meter.removed(at(share)) <= task.amount else (low, share)
        return top_up(task, at(low))


class MatrixParameters(Budget):
    name = "matrices"
    summary = "parameters of weight matrices, without norms and biases"
    from_shapes = True

    def cost(self, subject):
        graph = subject.graph
        names = {n: 1 for n, shape in graph.shapes.items() if len(shape) > 1 and n not in graph.ties}
        return WeightCost(SizeModel(graph, subject.groups), names, "matrix parameters")


class KeepNorm(Compensation):
    name = "keep-norm"
    summary = "scales the weights that read removed units to their norm before the cut"
    reads_text = False

    class Settings(ComponentSettings):
        share: float = Field(1.0, ge=0, le=1, description="How much of the lost norm is made good.")

    settings: Settings

    def repair(self, task):
        for name, units in task.kept.items():
            for span in task.graph.by_name[name].spans_with(Role.CONSUMES):
                weight = task.model.get_parameter(span.parameter)
                kept = weight[(slice(None),) * span.axis + (span.indices(units),)].norm()
                weight.mul_(1 + self.settings.share * (weight.norm() / kept - 1))
        return ()


class Counting(CalibrationSource):
    name = "counting"
    summary = "numbers one after another, from where the reference says"

    class Settings(ComponentSettings):
        step: int = Field(1, ge=1, description="Difference of neighbours.")

    settings: Settings

    def check(self, reference):
        if reference and not reference.isdigit():
            raise DataError(f"counting:{reference}: expected the number to begin with, such as counting:100")

    def sample(self, task):
        begin, needed = int(task.reference or 1), task.samples * task.length
        numbers = " ".join(str(begin + n * self.settings.step) for n in range(needed))
        ids = task.tokenizer(numbers, add_special_tokens=False)["input_ids"][:needed]
        return torch.tensor(ids).view(task.samples, task.length)


class Widths(ReportSection):
    name = "widths"
    summary = "units of every group, by layer"

    def render(self, subject):
        items = [f"<li>{escape(group.name)}: {group.units}</li>" for group in subject.graph.groups]
        return f"<h2>Widths</h2><ul>{''.join(items)}</ul>"


class Cautious(Method):
    """With another default where the model writes its calibration text."""

    name = "cautious"
    summary = "Wanda over structures on few samples, compensated, the middle half of the model"

    def defaults(self, asked, *, writes):
        samples = 4 if writes else 8
        return {"importance": "wanda-sp", "compensate": "refit", "samples": samples, "length": 16}


class Nothing(RecoveryStrategy):
    name = "nothing"
    summary = "no training at all"

    def train(self, job):
        return TrainingResult(job.model, (), 0)


class Unknown(ModelFamily):
    name = "unknown"
    summary = "a model type that nothing else understands"
    model_types = ("unknown-type",)


COMPONENTS = {
    "llmpruner_allocations": [Tapered],
    "llmpruner_budgets": [MatrixParameters],
    "llmpruner_compensations": [KeepNorm],
    "llmpruner_calibration_sources": [Counting],
    "llmpruner_importance_criteria": [Magnitude],  # noqa: F821
    "llmpruner_metrics": [Vocabulary],  # noqa: F821
    "llmpruner_exporters": [Weights],  # noqa: F821
    "llmpruner_runtimes": [Slow],  # noqa: F821
    "llmpruner_report_sections": [Widths],
    "llmpruner_methods": [Cautious],
    "llmpruner_model_families": [Unknown],
    "llmpruner_recovery_strategies": [Nothing, Imitation],  # noqa: F821
}
for hook, classes in COMPONENTS.items():
    globals()[hook] = hookimpl(lambda classes=classes: classes, specname=hook)


@hookimpl
def llmpruner_commands(app: typer.Typer):
    @app.command()
    def hello(name: str = "world"):
        """Greet someone."""
        typer.echo(f"hello, {name}")
