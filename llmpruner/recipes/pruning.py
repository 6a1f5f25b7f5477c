"""Making a plan, and pruning: checks first, then the stages of `pipeline`, in a run that can be interrupted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from ..engine.journal import Journal
from ..engine.ranks import Ranks
from ..engine.stages import write_run
from ..errors import LlmprunerError, OutputError, ProcessError, SettingsError, no_tokenizer
from ..files import check_new_directory, check_space, tree_bytes
from ..models.model import Model, Structure
from ..models.opening import reopened
from ..progress import Progress
from ..settings import PruneSettings, RunSettings
from ..structure.outcome import Outcome
from ..structure.plan import PruningPlan
from . import pipeline
from .arrangement import arrange, journal_for
from .checks import check_prune, check_replay
from .doubts import warn_of_allocation
from .execution import Run
from .forecast import Residency
from .jobs import PruneJob, prune_job
from .opening import Opener, Source
from .outcome import outcome_of
from .saving import save, save_alone
from .work import Work, work_of, work_of_plan


def make_plan(source: Source, settings: PruneSettings, opener: Opener, run: RunSettings) -> tuple[PruningPlan, Outcome]:
    """The plan, and the sizes of the model before and after the cut. Raises as `llmpruner.plan`."""
    ranks = Ranks.current()
    opener = opener.of_ranks(ranks)
    job = prune_job(settings, opener.catalog)
    if run.restart:
        raise SettingsError(
            "--restart has no effect on a plan, which keeps no results of an interrupted run; leave it out"
        )
    opened = opener.structure(source)
    check_prune(job, opened, tokenizer=opener.has_tokenizer(opened))
    warn_of_allocation(job, opened, opener.catalog, ranks)
    way, expected = ranks.from_first(lambda: arrange(opener, opened, job, work_of(job, opened, saves=False), run))
    if expected is not None:
        spilled, place = expected["disk"], Path(gettempdir()) / "llmpruner"
        ranks.from_first(
            lambda: check_space(place, spilled, "hidden states of the calibration text (TMPDIR names the folder)")
        )
    loaded = opener.weights(opened, streamed=way.streamed)
    how = Run(way.boundary_memory, divided=way.divided, ranks=ranks)
    made, cost = pipeline.make_plan(loaded, job, opener.progress, how)
    return made, replace(outcome_of(loaded, made, cost), forecast=expected)


@dataclass(frozen=True)
class Pruning:
    """A prune of ``source``. ``what``: the settings, or a plan to replay. ``given``: what the user gave of them, for
    ``run.json``. ``output``: where to save the result; None: nowhere."""

    source: Source
    what: PruneSettings | PruningPlan
    given: Mapping[str, Any]
    output: Path | None
    need_tokenizer: bool
    run: RunSettings

    def do(self, opener: Opener) -> Model:
        """The pruned model. Raises as `llmpruner.prune`."""
        ranks, output = Ranks.current(), self.output
        opener = opener.of_ranks(ranks)
        job = prune_job(self.what, opener.catalog) if isinstance(self.what, PruneSettings) else None
        if output is not None:
            ranks.from_first(lambda: check_new_directory(output))
        opened = opener.structure(self.source)
        work = self._checked(opened, job, opener)
        way, expected = self._arranged(opened, job, work, opener, ranks)
        if output is None:
            run = Run(way.boundary_memory, None, way.divided, ranks)
            loaded = self._loaded(opened, way, opener, run)
            return loaded.become(_with_forecast(self._cut(loaded, job, opener, run), expected))
        opener.say_widened(opened)
        journal = self._journal(output, opened, job, way, opener, ranks)
        if expected is not None:
            written = 0 if journal is None else tree_bytes(journal.folder)
            ranks.from_first(lambda: check_space(output, expected["disk"] - written, "the result and its way there"))
        with ExitStack() as stack:
            if journal is not None:
                stack.enter_context(journal.alone())
                # Another run may have ended since it was looked for.
                ranks.from_first(lambda: check_new_directory(output))
                # The files of a result depend on how the model is held, and free memory may differ when a run goes on.
                way = replace(way, streamed=bool((journal.load("way") or {"streamed": way.streamed})["streamed"]))
            run = Run(way.boundary_memory, journal, way.divided, ranks)
            loaded = self._loaded(opened, way, opener, run)
            with _resumable(journal, opener.progress):
                if journal is not None:
                    journal.store("way", {"streamed": way.streamed})
                pruned = _with_forecast(self._cut(loaded, job, opener, run), expected)
                opener.progress.status("saving")
                with run.stages.stage("saving"):
                    held = None if journal is None else journal.held
                    form = ranks.from_first(lambda: save_alone(held, output, lambda: save(pruned, output)))
                    pruned = replace(pruned, form=form)
                if ranks.first:
                    write_run(output, run.stages, "prune", opened.ref, self.given)
            pruned = loaded.become(reopened(pruned, output, trust_remote_code=opener.load.trust_remote_code))
            if journal is not None:
                journal.remove()
        return pruned

    def _checked(self, opened: Structure, job: PruneJob | None, opener: Opener) -> Work:
        """What is to be done, once it is sure that it can be done with this model."""
        has_tokenizer, saves = opener.has_tokenizer(opened), self.output is not None
        if self.need_tokenizer and not has_tokenizer:
            raise no_tokenizer(
                f"model '{opened.ref}'",
                "the pruned model could read no text; put its files (tokenizer.model, say) into the folder, or prune "
                "the weights alone with --no-tokenizer",
            )
        if self.run.restart and (not saves or isinstance(opened, Model)):
            raise SettingsError(
                "restart has no effect: only a prune of a reference with an output keeps results; leave it out"
            )
        if job is not None:
            check_prune(job, opened, tokenizer=has_tokenizer)
            warn_of_allocation(job, opened, opener.catalog, Ranks.current())
            return work_of(job, opened, saves=saves)
        assert isinstance(self.what, PruningPlan)
        check_replay(self.what, opened, opener.catalog)
        return work_of_plan(self.what, opened.graph, opener.catalog, saves=saves)

    def _arranged(
        self, opened: Structure, job: PruneJob | None, work: Work, opener: Opener, ranks: Ranks
    ) -> tuple[Residency, Mapping[str, Any] | None]:
        whole = "a result in memory" if self.output is None else None
        return ranks.from_first(lambda: arrange(opener, opened, job, work, self.run, whole=whole))

    def _journal(
        self, output: Path, opened: Structure, job: PruneJob | None, way: Residency, opener: Opener, ranks: Ranks
    ) -> Journal | None:
        """None for a model in memory, of which it is not known what it was read from."""
        if isinstance(opened, Model):
            return None
        return journal_for(
            output, opener, opened, self.what, way.divided, ranks, job=job, ending=".pruning", restart=self.run.restart
        )

    def _loaded(self, opened: Structure, way: Residency, opener: Opener, run: Run) -> Model:
        beside = None if self.output is None else self.output.resolve().parent
        with run.stages.stage("loading"):
            return opener.weights(opened, streamed=way.streamed, beside=beside)

    def _cut(self, loaded: Model, job: PruneJob | None, opener: Opener, run: Run) -> Model:
        if job is not None:
            draft = pipeline.draft_plan(loaded, job, opener.progress, run)
        else:
            assert isinstance(self.what, PruningPlan)
            draft = pipeline.Draft(self.what)
        return pipeline.apply_draft(loaded, draft, opener.catalog, opener.progress, run)


@contextmanager
def _resumable(journal: Journal | None, progress: Progress) -> Iterator[None]:
    """What a run leaves when it ends early: its journal, unless it was refused. A result that cannot be written does
    not cost what was computed for it."""
    try:
        yield
    except (KeyboardInterrupt, OutputError) as error:
        if journal is not None and journal.kept:
            why = "stopped" if isinstance(error, KeyboardInterrupt) else "what was computed is kept"
            progress.status(f"{why}; the same command goes on with what is done ({journal.folder}), or --restart")
        raise
    except ProcessError:
        raise
    except LlmprunerError:
        if journal is not None:
            journal.remove()
        raise


def _with_forecast(pruned: Model, expected: Mapping[str, Any] | None) -> Model:
    if pruned.outcome is None:
        return pruned
    return replace(pruned, outcome=replace(pruned.outcome, forecast=expected))
