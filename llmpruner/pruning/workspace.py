"""Where a prune works: the processes that share it, the folder of its finished steps, and its output."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any, TypeVar

from ..discovery.opening import Opener
from ..engine.execution import Execution
from ..engine.journal import Journal, recalled
from ..engine.ranks import Ranks
from ..engine.stages import write_run
from ..files import check_new_directory, check_space
from ..models.devices import named
from ..models.model import Model, Structure
from ..models.numbers import dtype_of
from ..progress import QUIET
from ..settings import RunSettings
from .checks import identity
from .forecast import Forecast, forecast
from .job import Job
from .minutes import measured, seconds_of
from .saving import save

_LOG = logging.getLogger("llmpruner")

J = TypeVar("J", bound=Job)


def opened(
    job: Job, structure: Structure, opener: Opener, run: RunSettings, *, cuts: bool = True
) -> tuple[Model, Execution]:
    """The model with its weights, and how to run it, for a result that stays in memory. ``cuts``: whether it is cut."""
    ranks = Ranks.current()
    expected = _expected(job, structure, opener, run, ranks, cuts=cuts, in_memory=cuts)
    if not cuts:
        ranks.from_first(lambda: check_space(Path(gettempdir()) / "llmpruner", expected.disk, "hidden states"))
    model = opener.weights(structure, streamed=expected.streamed)
    return model, Execution(model.weights, ranks, progress=opener.progress, forecast=asdict(expected))


@contextmanager
def resumable(
    job: Job, structure: Structure, opener: Opener, run: RunSettings, output: Path, shared: Journal | None = None
) -> Iterator[tuple[Model, Execution]]:
    """`opened`, for a result in ``output``: until the block ends, finished steps are kept in ``OUTPUT.pruning``, and
    the same job goes on from them. ``shared``: keeps text and scores for several ratios."""
    ranks = Ranks.current()
    done = shared is not None and job.compensation.repairs_each
    expected = _expected(job, structure, opener, run, ranks, cuts=True, in_memory=False, ratios=0 if done else 1)
    if ranks.first and not opener.has_tokenizer(structure):
        _LOG.warning(f"model '{structure.ref}' has no tokenizer, so the pruned model can't read text either")
    opener.say_widened(structure)
    folder = _folder(output)
    journal = None
    if not isinstance(structure, Model):  # a model in memory may have been read from anywhere
        journal = Journal(folder, identity(job, structure, opener), ranks)
    progress = QUIET if shared else opener.progress
    with journal.running(progress, anew=run.restart) if journal else nullcontext():
        written = ranks.from_first(lambda: sum(f.stat().st_size for f in folder.rglob("*")) if journal else 0)
        ranks.from_first(lambda: check_space(output, expected.disk - written, "temporary files and the result"))
        # The result's files depend on it, so a run that goes on reads weights as it did, whatever memory is free now.
        streamed = recalled(journal, f"streamed-{run.max_memory}", lambda: expected.streamed)
        model = opener.weights(structure, streamed=streamed, scratch=folder)
        ahead = asdict(replace(expected, streamed=streamed))
        shared = shared or journal
        yield model, Execution(model.weights, ranks, journal, opener.progress, shared=shared, forecast=ahead)


def _expected(
    job: Job, structure: Structure, opener: Opener, run: RunSettings, ranks: Ranks, *, cuts: bool, in_memory: bool,
    ratios: int = 1,
) -> Forecast:  # fmt: skip
    """What the run will take, which is shown. ``ratios``: how many are fitted together; 0: that was done before."""

    def expected() -> Forecast:
        memory = forecast(job, structure, opener, run.max_memory, saves=cuts, in_memory=in_memory)
        if not ratios:
            return memory
        item, device = dtype_of(structure, opener.load).itemsize, opener.device_for(structure)
        rates = measured(job, structure, item, device)
        seconds = seconds_of(job, structure, rates, streamed=memory.streamed, cuts=cuts, ratios=ratios)
        return replace(memory, seconds=seconds / ranks.count)

    chosen = ranks.from_first(expected)
    opener.progress.status(str(chosen))
    return chosen


def saved(model: Model, output: Path, execution: Execution, command: str, settings: Mapping[str, Any]) -> Model:
    """``model``, saved to ``output`` with the record of the run, ``run.json``. ``settings``: what the user set."""
    execution.progress.status("saving")
    with execution.stages.stage("saving"):
        form = execution.ranks.from_first(lambda: save(model, output))
    if execution.ranks.first:
        device, seconds = named(execution.weights.device), execution.progress.seconds()
        write_run(output, execution.stages, command, model.ref, settings, device, seconds)
    return replace(model, form=form)


@contextmanager
def several(
    jobs: Mapping[str, J], structure: Structure, opener: Opener, run: RunSettings, output: Path
) -> Iterator[tuple[Journal, Mapping[str, J]]]:
    """For ``jobs`` that differ in the ratio, by folder in ``output``: what they share, and those not finished yet."""
    ranks = Ranks.current()
    folder = _folder(output)
    if run.restart or not ranks.from_first(folder.is_dir):
        ranks.from_first(lambda: check_new_directory(output))
    journal = Journal(folder, {**identity(next(iter(jobs.values())), structure, opener), "sizes": list(jobs)}, ranks)
    with journal.running(opener.progress, anew=run.restart):
        if ranks.from_first(lambda: not journal.kept):
            ranks.from_first(lambda: check_new_directory(output))
            journal.store("sizes", list(jobs))  # marks the folders in ``output`` as those of this run
        ranks.from_first(lambda: output.mkdir(exist_ok=True))
        finished = [name for name in jobs if ranks.from_first((output / name).exists)]
        for name in finished:
            opener.progress.status(f"{output / name} is finished")
        try:
            yield journal, {name: job for name, job in jobs.items() if name not in finished}
        finally:
            if ranks.first:
                with suppress(OSError):  # not empty
                    output.rmdir()


@contextmanager
def together(
    jobs: Mapping[str, Job], structure: Structure, opener: Opener, run: RunSettings, output: Path, shared: Journal
) -> Iterator[tuple[Model, Mapping[str, Execution]]]:
    """The model, and how to run it for each of ``jobs``, with the journals from which `resumable` goes on."""
    ranks, job = Ranks.current(), next(iter(jobs.values()))
    expected = _expected(job, structure, opener, run, ranks, cuts=True, in_memory=False, ratios=len(jobs))
    ranks.from_first(lambda: check_space(output, len(jobs) * expected.disk, "temporary files and the results"))
    with ExitStack() as stack:
        journals = {}
        for name, each in jobs.items():
            folder = _folder(output / name)
            journals[name] = Journal(folder, identity(each, structure, opener), ranks)
            stack.enter_context(journals[name].running(stays=True))
        model = opener.weights(structure, streamed=expected.streamed, scratch=shared.folder)
        execution = Execution(model.weights, ranks, progress=opener.progress, shared=shared)
        yield model, {name: replace(execution, journal=journal) for name, journal in journals.items()}


def _folder(output: Path) -> Path:
    """Where the steps of a run are kept."""
    return output.with_name(output.name + ".pruning")
