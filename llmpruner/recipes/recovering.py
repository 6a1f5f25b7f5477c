"""Recovering a pruned model: checks first, then the data, the training, and the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..calibration.chat import format_note
from ..calibration.conversations import Example
from ..discovery.dense import dense_structure, load_dense, open_dense, placed_as
from ..engine.boundaries import DEFAULT_LIMIT
from ..engine.ranks import Ranks
from ..engine.stages import Stages, launched, write_run
from ..errors import DataError, ModelError, SettingsError, no_tokenizer
from ..files import check_new_directory, check_space, remove_tree, tree_bytes, write_text
from ..folders import Held
from ..models.identity import model_identity
from ..models.model import Model, Structure
from ..models.numbers import check_device, loaded_bytes
from ..models.opening import reopened
from ..models.positions import check_table_of_config, table_of_config
from ..models.record import read_any_record
from ..models.weights import Weights
from ..progress import QUIET
from ..recovery.base import LayerWalk
from ..recovery.checks import check_before_writing, check_steps
from ..recovery.dense_text import (
    ANSWER_TOKENS,
    TEXT_TOKENS,
    WRITTEN_FILE,
    DenseText,
    WrittenRows,
    dense_text_in,
    fitting_instructions,
)
from ..recovery.examples import load_examples
from ..recovery.processes import check_processes
from ..recovery.result import RecoveryResult
from ..recovery.run import recover
from ..recovery.training_data import TrainingData, prepare
from ..recovery.work_dir import alone_with, check_work_dir
from ..report.history import loss_curve
from ..settings import RecoverSettings, RunSettings
from ..structure.plan import original_layers, structure_of
from .checks import check_adapters, check_recover
from .default_strategy import with_strategy
from .fitting import boundary_limit
from .forecast import Residency
from .jobs import RecoverJob, recover_job
from .opening import Opener, Source, check_source
from .recovery_memory import arranged_layers, layers_disk, refuse_without_layers, states_bytes
from .saving import save, save_alone
from .training_memory import check_training, reads_dense_by_layer, training_forecast


@dataclass(frozen=True)
class _Way:
    """How models are held. ``streamed``, ``dense_streamed``: whether the pruned and the dense one are read layer by
    layer; ``boundary_memory``: bytes of hidden states in memory."""

    streamed: bool
    dense_streamed: bool
    boundary_memory: int

    @classmethod
    def of(cls, both: Residency) -> _Way:
        return cls(both.streamed, both.streamed, both.boundary_memory)


@dataclass(frozen=True)
class _Dense:
    """The dense model without its weights. ``fingerprint``: of its files."""

    structure: Structure
    fingerprint: str


@dataclass(frozen=True)
class Recovery:
    """A training of ``source``. ``output``: where to save the result; None: nowhere. ``work_dir``: of the state of the
    training; None: beside ``output``."""

    source: Source
    settings: RecoverSettings
    output: Path | None
    work_dir: Path | None
    run: RunSettings

    def do(self, opener: Opener) -> Model:
        """The trained model. Raises as `llmpruner.recover`."""
        check_source(self.source)
        folder = self._folder()
        job = self._checked(opener, folder)
        ranks, output = Ranks.current(), self.output
        opener = opener.of_ranks(ranks)
        own = dense_text_in(job.settings.data)
        opened = opener.readable(self.source, "be trained on text")
        tokenizer = opener.tokenizer(opened)
        data = None if own is not None else prepare(job.settings, opened.family, tokenizer)
        trusted = opener.load.trust_remote_code
        job = _with_strategy(job, opened, opener)
        if own is not None:
            job = _within_positions(job, own, opened, tokenizer)
        _check_data(job, opened, own, data, tokenizer)
        needs_dense = job.strategy.needs_dense or own is not None
        dense = _dense(opened, own, opener) if needs_dense else None
        lengths = _lengths(data, own)
        way = self._arranged(job, opened, None if dense is None else dense.structure, lengths, opener)
        if output is not None:
            _check_disk(output, folder, job, opened, lengths, way, opener)
            opener.say_widened(opened)
        with ExitStack() as stack:
            alone = alone_with(ranks, folder, stack, anew=self.run.restart)
            if output is not None:
                # Another run may have ended since it was looked for.
                ranks.from_first(lambda: check_new_directory(output))
            stages, beside = Stages(), folder.resolve().parent
            if data is None:
                assert own is not None and dense is not None
                with stages.stage("writing examples"):
                    rows = _dense_rows(own, opened, dense, opener, way, folder, job.settings.seed, alone.held)
                examples = load_examples(
                    job.settings.data, opened.family, tokenizer, limit=job.settings.limit, seed=job.settings.seed,
                    written={own.source: rows},
                )  # fmt: skip
                data = prepare(job.settings, opened.family, tokenizer, examples)
            with stages.stage("loading"):
                loaded = opener.weights(opened, streamed=way.streamed, beside=beside, ahead=False)
            with stages.stage("training"):
                taught = dense.fingerprint if dense is not None and job.strategy.needs_dense else None
                result = _trained(job, loaded, data, folder, way, opener, taught, alone.check)
            recovered = loaded.become(_recovered(loaded, result))
            if output is None:
                return recovered
            with stages.stage("saving"):
                form = ranks.from_first(
                    lambda: save_alone(alone.held, output, lambda: _save(recovered, result, output, folder))
                )
            if ranks.first:
                write_run(output, stages, "recover", opened.ref, job.settings.given())
            loaded.become(reopened(replace(recovered, form=form), output, trust_remote_code=trusted))
            if self.work_dir is None and ranks.first:
                remove_tree(folder)
            return loaded

    def _checked(self, opener: Opener, folder: Path) -> RecoverJob:
        """The job, once all is checked that needs no model."""
        job, output = recover_job(self.settings, opener.catalog), self.output
        refuse_without_layers(job, self.run)
        _check_alone(job, dense_text_in(job.settings.data))
        if output is not None and not job.settings.merge and isinstance(self.source, Model):
            _check_files(self.source)
        check_device(opener.load.device)
        # Processes connect only now.
        ranks = Ranks.current()
        check_processes(job.settings, opener.load)
        if output is not None:
            ranks.from_first(lambda: check_new_directory(output))
        ranks.from_first(lambda: check_work_dir(folder))
        check_recover(job)
        return job

    def _folder(self) -> Path:
        """Of the state of the training."""
        if self.work_dir is not None:
            return self.work_dir
        if self.output is None:
            raise SettingsError("recovery needs a directory for its state: give output, or work_dir")
        if not self.output.name:  # of the current folder, and of the root
            check_new_directory(self.output)
        return self.output.with_name(self.output.name + ".recovery")

    def _arranged(
        self, job: RecoverJob, opened: Structure, dense: Structure | None, lengths: Sequence[int], opener: Opener
    ) -> _Way:
        """How the models are held. ``lengths``: tokens of the examples."""
        saves = self.output is not None
        if isinstance(opened, Model) and opened.streamed is not None:
            if not job.strategy.by_layer or not saves:
                raise ModelError(
                    f"'{opened.ref}' is read layer by layer; pass its folder, or use strategy local with an output"
                )
            if self.run.max_memory is not None:
                raise SettingsError("max_memory has no effect on a model that is opened already; leave it out")
            return _Way.of(Residency(True, boundary_limit(self.run)))
        if not job.strategy.by_layer or dense is None:
            teacher = dense if job.strategy.needs_dense else None
            by_layer = reads_dense_by_layer(job, opened, teacher, opener.load, opener.catalog)
            needs = training_forecast(job, opened, teacher, opener.load, opener.catalog, by_layer=by_layer)
            check_training(job, opened, needs, opener.load)
            opener.progress.status(str(needs))
            if self.output is not None:
                output, states = self.output, needs.disk - tree_bytes(self._folder())
                what = "the result and states of the training"
                Ranks.current().from_first(lambda: check_space(output, states, what))
            return _Way(False, by_layer, DEFAULT_LIMIT)
        found = arranged_layers(
            job, opened, dense, opener.load, self.run, opener.catalog, lengths=lengths,
            whole=None if saves else "a result in memory", shown=opener.progress is not QUIET,
        )  # fmt: skip
        if isinstance(found, Residency):
            return _Way.of(found)
        opener.progress.status(str(found))
        return _Way.of(found.residency)


def _check_data(
    job: RecoverJob, opened: Structure, own: DenseText | None, data: TrainingData | None, tokenizer: Any
) -> None:
    """Raise for what is wrong with the data, or with the steps on it, before a model is loaded."""
    layers = opened.graph.num_layers if job.strategy.by_layer else 1
    if own is not None:
        check_before_writing(job.settings, own, opened.family, tokenizer, layers)
    elif data is not None:
        longest = max(map(len, (row["input_ids"] for row in data.rows.rows)))
        what = f"examples of up to {longest:,} tokens"
        check_table_of_config(opened.config, opened.ref, longest, what, "lower --cutoff")
        check_steps(job.settings, len(data.rows.rows), layers, Ranks.current().count)


def _within_positions(job: RecoverJob, own: DenseText, opened: Structure, tokenizer: Any) -> RecoverJob:
    """``job`` with examples no longer than a table of positions of the model, which is that of the dense one. Raises
    `DataError` where they were asked to be longer, and as `fitting_instructions`, before anything is written."""
    limit, settings = table_of_config(opened.config), job.settings
    if limit is None:
        return job
    if own.answers:
        fitting_instructions(opened.family, tokenizer, limit, own.source)
    if settings.cutoff <= limit:
        return job
    if "cutoff" in settings.model_fields_set:
        raise DataError(f"--cutoff {settings.cutoff} is beyond the {limit:,} positions of '{opened.ref}'; lower it")
    return replace(job, settings=settings.model_copy(update={"cutoff": limit}))


def _format_of(data: TrainingData, job: RecoverJob, model: Model) -> str | None:
    """A line on the format that the examples are in, where it is not the chat template that comes with the model; None
    where it was said before the dense model answered instructions."""
    own = dense_text_in(job.settings.data)
    if not data.in_format or (own is not None and own.answers):
        return None
    return format_note(model.ref, model.family, model.tokenizer, "examples are")


def _lengths(data: TrainingData | None, own: DenseText | None) -> list[int]:
    """Tokens of the examples, or of those that the dense model writes (``own``), at most and without prompts."""
    if data is not None:
        return [len(row["input_ids"]) for row in data.rows.rows]
    return [] if own is None else [ANSWER_TOKENS] * own.answers + [TEXT_TOKENS] * own.texts


def _check_disk(
    output: Path, folder: Path, job: RecoverJob, opened: Structure, lengths: Sequence[int], way: _Way, opener: Opener
) -> None:
    """Raise `OutputError` where the disk has too little room for ``output`` and what a training of one layer after the
    other keeps in ``folder``, beside what is there."""
    if not job.strategy.by_layer:
        return
    item = loaded_bytes(opened, opener.load) // opened.graph.total_parameters
    states = states_bytes(job, opened, lengths)
    size = layers_disk(opened.graph, item, states, Residency(way.streamed, way.boundary_memory))
    check_space(output, size - tree_bytes(folder), "the result, finished layers and hidden states")


def _dense(opened: Structure, own: DenseText | None, opener: Opener) -> _Dense:
    try:
        found = dense_structure(opened, opener.catalog, trust_remote_code=opener.load.trust_remote_code)
    except ModelError as error:
        if own is None:
            raise
        raise ModelError(f"{error}; it would write the examples of --data {own.source}: give --data FILE") from error
    return _Dense(found, model_identity(found, opener.catalog) or found.ref)


def _with_strategy(job: RecoverJob, opened: Structure, opener: Opener) -> RecoverJob:
    """``job`` with a strategy that can train the model."""
    job, why = with_strategy(job, opened, opener.load, opener.catalog)
    if why is not None:
        check_adapters(job)
        opener.progress.status(why)
    job.strategy.check(opened.graph, {cut.kind for plan in opened.plans for cut in plan.cuts.values()})
    return job


def _check_files(model: Model) -> None:
    """Raise `ModelError` for a model that is not as its files, which adapters name as the model that they are for."""
    record = model.record or {}
    kept = read_any_record(model.path) if model.path is not None and Path(model.path).is_dir() else record
    cuts, trainings = len(record.get("plans") or ()), len((kept or {}).get("recovery") or ())
    if len(model.plans) != cuts or len(record.get("recovery") or ()) != trainings:
        raise ModelError(
            f"'{model.ref}' was pruned or trained in this process, and adapters name the folder of the model that they "
            "are for; save it and pass its folder, or merge the adapters"
        )


def _check_alone(job: RecoverJob, own: DenseText | None) -> None:
    """Raise `SettingsError` in several processes for what runs in one. ``own``: data that the dense model writes."""
    if launched() and (job.strategy.by_layer or own is not None):
        what = job.strategy.label() if job.strategy.by_layer else f"--data {job.settings.data}"
        raise SettingsError(f"{what} runs in one process; start it without torchrun or accelerate launch")


def _trained(
    job: RecoverJob,
    loaded: Model,
    data: TrainingData,
    folder: Path,
    way: _Way,
    opener: Opener,
    dense: str | None,
    check_folder: Callable[[], None],
) -> RecoveryResult:
    """The result of `recover` for ``loaded``, with messages for the user. ``dense``: the fingerprint of the dense
    model, where the strategy needs it."""
    progress, trusted = opener.progress, opener.load.trust_remote_code
    note = _format_of(data, job, loaded)
    if note is not None:
        progress.status(note)
    progress.status(f"training, strategy {job.strategy.name}")
    with ExitStack() as shown:
        started: list[Callable[[int, int, float], None]] = []

        def on_step(number: int, total: int, loss: float) -> None:
            # Only now, as what comes before may have a bar of its own.
            if not started:
                started.append(shown.enter_context(progress.counter("Recovering")))
            started[0](number, total, loss)

        result = recover(
            loaded.model, loaded.tokenizer, loaded.graph, data, job.strategy, job.settings, folder,
            load_teacher=partial(load_dense, loaded, opener.catalog, trust_remote_code=trusted),
            layers=original_layers(loaded.plans), walk=_layer_walk(loaded, way, opener, folder.resolve().parent),
            on_step=on_step, on_validation=lambda done: progress.status(str(done)), dense=dense, progress=progress,
            changing=loaded.changing("recovery"), check_folder=check_folder,
        )  # fmt: skip
    for note in result.notes:
        progress.status(note)
    return result


def _save(recovered: Model, result: RecoveryResult, directory: Path, folder: Path) -> str:
    """Write the model, with a picture of its losses that is drawn in ``folder``; returns its form."""
    files = []
    # The losses of one layer after the other are no curve.
    if result.losses and not result.strategy.by_layer:
        files.append(folder / "loss.svg")
        write_text(files[0], loss_curve(result.record()))
    return save(recovered, directory, extra_files=files)


def _dense_rows(
    own: DenseText,
    opened: Structure,
    dense: _Dense,
    opener: Opener,
    way: _Way,
    folder: Path,
    seed: int,
    held: Held | None,
) -> list[Example]:
    """The examples that the dense model writes, of which those of an interrupted run are in ``folder``. ``opened``: the
    pruned model."""
    load, progress = opener.load, opener.progress
    if isinstance(opened, Model):
        load = placed_as(opened, load.trust_remote_code)
    identity = own.identity(f"{dense.fingerprint} {structure_of(dense.structure.graph)} {load.dtype}", seed)
    rows = WrittenRows(folder / WRITTEN_FILE, identity, held)
    if not rows.whole:
        model = open_dense(opened, opener.catalog, load, streamed=way.streamed, beside=folder.resolve().parent)
        if model.tokenizer is None:
            raise no_tokenizer(f"the dense model '{model.ref}'", "it cannot write examples")
        note = format_note(model.ref, model.family, model.tokenizer, "instructions are") if own.answers else None
        if note is not None:
            progress.status(note)
        if model.streamed is not None:
            progress.status(f"'{model.ref}' is read from its files for every token; a file of examples is faster")
        rows.write(own, model.model, model.tokenizer, model.family, seed, progress)
    return rows.examples


def _layer_walk(pruned: Model, way: _Way, opener: Opener, beside: Path) -> LayerWalk:
    """How a strategy that runs models layer by layer reads them."""
    walk = LayerWalk(boundary_memory=way.boundary_memory)
    if not way.dense_streamed:
        return walk
    return replace(walk, pruned=pruned.streamed, open_dense=partial(_dense_weights, pruned, opener, beside))


def _dense_weights(pruned: Model, opener: Opener, beside: Path) -> Weights:
    """The weights of the dense model, read layer by layer."""
    placed = placed_as(pruned, opener.load.trust_remote_code)
    return open_dense(pruned, opener.catalog, placed, streamed=True, beside=beside).weights


def _recovered(model: Model, result: RecoveryResult) -> Model:
    history = [*((model.record or {}).get("recovery", [])), result.record()]
    return replace(model, model=result.model, record={**(model.record or {}), "recovery": history})
