"""The forecast of a prune, computed from shapes before weights are read.

Memory (`forecast_memory`) follows from what the code of each stage allocates; the numbers of a layer's activations and
all rates, by which time is computed (`forecast_time`), are measured on a sample of one layer (`layer_sample`).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from ..engine.journal import INTERVAL
from ..pruning.compensation.trials import TRIED
from ..structure.kept import parameters_after
from .forecast import LATER, Forecast, Residency, Stage
from .forecast_memory import Memory
from .forecast_sizes import Sizes
from .forecast_time import OPENING, READ, Time
from .layer_sample import LayerSample
from .work import Work

if TYPE_CHECKING:
    import torch

    from ..models.model import Structure


def forecast(
    structure: Structure,
    work: Work,
    dtype: torch.dtype,
    residency: Residency,
    sample: LayerSample | None,
    *,
    base: int,
    mixed: bool = False,
    converting: float | None = None,
    free: int = 0,
) -> Forecast:
    """The `Forecast` of a prune. ``base``: resident bytes of the process before it. ``mixed``: whether products of
    float32 weights are computed in bfloat16. ``sample``: None where no layer could be run; activations are estimated
    from widths then, and the time is not known. ``converting``: values per second that are computed when a layer is
    read; None where it is mapped from its file. ``free``: bytes in which the system keeps files that were read."""
    return _Forecaster(structure, work, dtype, residency, sample, mixed, converting, free).run(base)


class _Forecaster:
    def __init__(
        self,
        structure: Structure,
        work: Work,
        dtype: torch.dtype,
        residency: Residency,
        sample: LayerSample | None,
        mixed: bool,
        converting: float | None,
        free: int,
    ) -> None:
        whole_logits = sample is not None and sample.whole_logits
        self.sizes = sizes = Sizes(structure, work, dtype, residency, mixed=mixed, whole_logits=whole_logits)
        self.graph, self.work, self.residency, self.converting = structure.graph, work, residency, converting
        self.read_once = sizes.weights < free
        """Whether the files stay in the system's memory, so that only the first walk waits for the disk."""
        self.memory = Memory(sizes, residency, sample, converts=converting is not None)
        self.time = None if sample is None else Time(sizes, residency, sample, converting, read_once=self.read_once)

    def run(self, base: int) -> Forecast:
        work, memory = self.work, self.memory
        stages = [self.opening()]
        if work.written:
            stages.append(self.writing())
        elif work.tokens:
            stages.append(Stage("reading", {**memory.weights(), **memory.calibration()}, 0.0))
        if work.signals:
            stages.append(self.estimation())
        fit_disk = 0
        if work.fits:
            stage, fit_disk = self.compensation()
            stages.append(stage)
        if work.saves:
            stages.append(self.saving())
        share = parameters_after(self.graph, work.kept)[0] / self.graph.total_parameters
        output = round(self.sizes.weights * share) if work.saves else 0
        disk = max(memory.estimation_disk(), output + fit_disk)
        if self.residency.once:
            disk += self.sizes.weights
        return Forecast(self.residency, base + LATER, tuple(stages), disk)

    def opening(self) -> Stage:
        # A streamed model has only names and shapes when it is opened; its first walk reads it.
        streamed = self.residency.streamed
        read = self.sizes.weights / READ if self.read_once or not streamed else 0.0
        if self.residency.once and self.converting is not None:
            # They are written besides; the first walk does both.
            read += self.graph.total_parameters / self.converting + self.sizes.weights / READ
        memory = {} if streamed else self.memory.weights()
        return Stage("opening", memory, None if self.time is None else OPENING + read)

    def writing(self) -> Stage:
        return Stage("writing", self.memory.writing(), None if self.time is None else self.time.writing())

    def estimation(self) -> Stage:
        work, time = self.work, self.time
        elements = sum(prod(self.graph.shapes[name]) for name in work.names)
        if not work.scored and work.chooses:
            return Stage("estimation", self.memory.weights(), 0.0)
        if not work.scored:
            memory = {**self.memory.weights(), "scores of one parameter": self.memory.scoring()}
            return Stage("estimation", memory, None if time is None else time.scoring(elements))
        seconds = None
        if time is not None:
            if work.gradients:
                step = time.gradients(elements)
            else:
                step = time.forward(work.scored, work.names) + time.scoring(elements)
            seconds = step * work.steps + work.trials * time.layers(time.sample.forward.of(TRIED))
        return Stage("estimation", self.memory.estimation(), seconds)

    def compensation(self) -> tuple[Stage, int]:
        """The stage, and bytes of its files."""
        solved = [fit for fit in self.sizes.consumers() if fit.inputs and fit.outputs]
        memory, streams = self.memory.compensation(solved)
        seconds = None if self.time is None else self.time.fits(solved)
        journal = sum(prod(self.graph.shapes[name]) for name in self.sizes.consumer_names()) * self.sizes.item
        if seconds is None or seconds > INTERVAL:
            # The states of the last layer that was written, and those that replace them.
            journal += 4 * self.memory.streams(self.work.tokens)
        beyond = streams - self.memory.in_memory(streams)
        return Stage("compensation", memory, seconds), journal + beyond

    def saving(self) -> Stage:
        return Stage("saving", self.memory.saving(), None if self.time is None else self.time.saving())
