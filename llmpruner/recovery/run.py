"""The recover stage: training a pruned model on instruction data."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..amounts import counted
from ..engine.ranks import Ranks
from ..engine.weights import Weights
from ..errors import OutputError, PluginError
from ..files import Held, alone_in, holds_files, write_failure, write_text
from ..models.vocabulary import check_ids
from ..progress import QUIET, Progress
from ..settings import RecoverSettings, option_of
from .base import LayerWalk, RecoveryJob, RecoveryStrategy, TrainingResult, Validation
from .dense_text import WRITTEN_FILE
from .examples import Examples, Rows, load_examples, rows_of, split
from .schedule import chosen_in, steps, with_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..families.family import ModelFamily
    from ..structure.coupling import CouplingGraph

_IDENTITY = "job.json"
_NOT_SHARED = {"data", "strategy", "limit", "merge", "settings", "report_to"}
"""Fields of `RecoverSettings` that are not shared by strategies, or recorded separately, or that change no result."""


@dataclass(frozen=True)
class TrainingData:
    """The rows of a training. ``source``, ``fingerprint``: of the data, see `Examples`; with data of its own for
    validation, the fingerprint is of both. ``validation``: None without one. ``notes``: messages for the user.
    ``in_format``: see `Examples`."""

    source: str
    fingerprint: str
    rows: Rows
    validation: Rows | None = None
    notes: tuple[str, ...] = ()
    in_format: bool = False


@dataclass(frozen=True)
class RecoveryResult:
    """``model``: of the same class as before; a peft model where adapters were not merged. ``losses``: see
    `TrainingResult`. ``seconds``: of this run, without those before an interruption. ``examples``: number of rows that
    were trained on. ``fingerprint``: see `TrainingData`. ``validation``: the losses on ``validation_examples`` rows, in
    order of steps; empty where there was none. ``best_step``: the number of steps after which the weights were taken;
    None without validation."""

    model: Any
    strategy: RecoveryStrategy
    settings: RecoverSettings
    losses: tuple[float, ...]
    seconds: float
    examples: int
    source: str
    fingerprint: str
    trainable_parameters: int
    notes: tuple[str, ...]
    validation: tuple[Validation, ...] = ()
    validation_examples: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best_step(self) -> int | None:
        return min(self.validation, key=lambda one: one.loss).step if self.validation else None

    def record(self) -> dict[str, Any]:
        """The training as JSON values, for ``llmpruner.json``."""
        return {
            "strategy": self.strategy.name,
            "strategy_settings": self.strategy.record(),
            "settings": shared_settings(self.settings),
            "data": self.source,
            "fingerprint": self.fingerprint,
            "examples": self.examples,
            "trainable_parameters": self.trainable_parameters,
            "losses": list(self.losses),
            "validation_examples": self.validation_examples,
            "validation": [asdict(one) for one in self.validation],
            "best_step": self.best_step,
            **self.details,
        }


def prepare(
    settings: RecoverSettings, family: ModelFamily, tokenizer: Any, examples: Examples | None = None
) -> TrainingData:
    """Read the data, hold some back for validation, and tokenise it. ``examples``: used instead of ``settings.data``.

    Raises `DataError` for data that cannot be used; no model is needed to find that out.
    """

    def read(source: str, limit: int | None) -> Examples:
        return load_examples(source, family, tokenizer, limit=limit, seed=settings.seed)

    def tokenised(part: Examples) -> Rows:
        return rows_of(part, tokenizer, cutoff=settings.cutoff, loss_on=settings.loss_on, pack=settings.pack)

    examples = examples or read(settings.data, settings.limit)
    held_out, fingerprint, notes = None, examples.fingerprint, []
    if settings.validation_data is not None:
        held_out = read(settings.validation_data, None)
        fingerprint = hashlib.sha256(f"{fingerprint} {held_out.fingerprint}".encode()).hexdigest()
    else:
        examples, held_out = split(examples, settings.validation, settings.seed)
        if held_out is None and settings.validation:
            count = len(examples.texts)
            are = "is" if count == 1 else "are"
            notes.append(f"{counted(count, 'example')} {are} too few to hold some back: no validation")
    rows = tokenised(examples)
    if rows.left_out:
        were = "was" if rows.left_out == 1 else "were"
        notes.append(f"{counted(rows.left_out, 'example')} had nothing to train on and {were} left out")
    validation = None if held_out is None else tokenised(held_out)
    return TrainingData(examples.source, fingerprint, rows, validation, tuple(notes), examples.in_format)


def recover(
    model: PreTrainedModel,
    tokenizer: Any,
    graph: CouplingGraph,
    family: ModelFamily,
    strategy: RecoveryStrategy,
    settings: RecoverSettings,
    work_dir: Path,
    *,
    examples: Examples | None = None,
    data: TrainingData | None = None,
    load_teacher: Callable[[], PreTrainedModel] | None = None,
    layers: tuple[int, ...] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    on_validation: Callable[[Validation], None] | None = None,
    walk: LayerWalk | None = None,
    dense: str | None = None,
    progress: Progress = QUIET,
    changing: AbstractContextManager[None] | None = None,
    alone: Callable[[], None] | None = None,
) -> RecoveryResult:
    """Train ``model``, in place, with ``strategy``.

    ``graph``: the coupling graph of ``model``. ``settings``: the name of a strategy and the settings for it have no
    effect, as ``strategy`` has its own. ``data``: the result of `prepare`, if it was called before; else ``examples``,
    if given, are used instead of ``settings.data``. ``load_teacher``: loads the dense model, for strategies that need
    it. ``layers``, ``walk``, ``progress``: see `RecoveryJob`. ``on_step``: called after each optimizer step with its
    number from 1, the number of steps, and its loss. ``on_validation``: called after each validation. ``dense``: what
    identifies the dense model, for strategies that need it. ``changing``: active while weights change. ``alone``: where
    the caller is alone in ``work_dir`` already, what raises when that is not so any more; given in all of several
    processes, or in none.

    When ``work_dir`` contains the state of the same job, training continues from it. Delete the directory once the
    result is saved. Raises `OutputError` when it contains anything else, when another run works in it, and when it is
    removed or replaced meanwhile; `DataError` for data that cannot be used, and `ModelError` when the training
    diverges.

    In several processes, all call this with the same arguments, and each has the result.
    """
    data = data or prepare(settings, family, tokenizer, examples)
    largest = max(max(row["input_ids"]) for row in data.rows.rows)
    check_ids(torch.tensor([largest]), model)
    if settings.minutes is None:
        settings = with_batch(settings, lambda one: steps(one, len(data.rows.rows)), Ranks.current().count)
    held_out = data.validation or Rows([], [])
    walk = walk or LayerWalk()
    identity = _identity(walk.pruned or Weights(model, graph.layers), data, strategy, settings)
    if dense is not None:
        identity["dense model"] = dense
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    started = time.perf_counter()
    done: list[Validation] = []

    def check_folder() -> None:
        if alone is not None:
            alone()

    # What is written for a step or a validation is written after its report.
    def stepped(number: int, total: int, loss: float) -> None:
        check_folder()
        if on_step is not None:
            on_step(number, total, loss)

    def validated(step: int, loss: float, perplexity: float | None) -> None:
        check_folder()
        done.append(Validation(step, loss, perplexity))
        if on_validation is not None:
            on_validation(done[-1])

    with ExitStack() as stack, _writing(work_dir):
        if alone is None:
            alone = alone_with(Ranks.current(), work_dir, stack).check
        Ranks.current().from_first(lambda: _claim(work_dir, identity))
        job = RecoveryJob(
            model, tokenizer, data.rows.rows, graph, settings, work_dir, stepped, load_teacher, layers, walk=walk,
            validation=held_out.rows, on_validation=validated, places=[*data.rows.places, *held_out.places],
            progress=progress, check_folder=check_folder,
        )  # fmt: skip
        with changing or nullcontext():
            result = strategy.train(job)
        check_folder()
        chosen = Ranks.current().from_first(lambda: chosen_in(work_dir))
    seconds = time.perf_counter() - started
    if chosen:
        settings = settings.model_copy(update={"batch_size": chosen["batch_size"]})
    if not isinstance(result, TrainingResult):
        raise PluginError(f"recovery strategy '{strategy.name}' returned {type(result).__name__}, not a TrainingResult")
    trained = merge_adapters(result.model) if settings.merge else result.model
    if not hasattr(trained, "peft_config"):
        trained.requires_grad_(True)
        for name in frozen:
            trained.get_parameter(name).requires_grad_(False)
    return RecoveryResult(
        trained.eval(),
        strategy,
        settings,
        result.losses,
        seconds,
        len(data.rows.rows),
        data.source,
        data.fingerprint,
        result.trainable_parameters,
        (*result.notes, *data.notes, *_said_of_validation(strategy, settings, result, held_out, done)),
        tuple(done),
        len(held_out.rows),
        result.details,
    )


class Alone:
    """A folder of a run alone. ``held``: None in all processes but the first, which writes the files."""

    def __init__(self, held: Held | None) -> None:
        self.held = held

    def check(self) -> None:
        """Raise `OutputError` where the folder was taken from the run."""
        if self.held is not None:
            self.held.check()


def alone_with(ranks: Ranks, work_dir: Path, stack: ExitStack, *, anew: bool = False) -> Alone:
    """``work_dir`` for this run alone, until ``stack`` ends, see `alone_in`. All processes must call it together."""
    found: list[Held] = []
    ranks.from_first(lambda: found.append(stack.enter_context(alone_in(work_dir, anew=anew))))
    return Alone(found[0] if found else None)


@contextmanager
def _writing(work_dir: Path) -> Iterator[None]:
    """A full disk under a strategy, whose libraries raise what they like, as an `OutputError`."""
    try:
        yield
    except Exception as error:
        reason = write_failure(error)
        if reason is None:
            raise
        raise OutputError(
            f"the state of the training in {work_dir} cannot be written: {reason}; the same command goes on from the "
            "last one that was"
        ) from error


def _said_of_validation(
    strategy: RecoveryStrategy,
    settings: RecoverSettings,
    result: TrainingResult,
    held_out: Rows,
    done: list[Validation],
) -> list[str]:
    """Notes for the user."""
    if not held_out.rows:
        return []
    if not done:
        return [f"{strategy.label()} measures no validation loss; --validation 0 trains on all examples"]
    notes, best, last = [], min(done, key=lambda one: one.loss), done[-1]
    if settings.patience is not None and done.index(best) + settings.patience == len(done) - 1 and best is not last:
        notes.append(f"stopped after step {last.step}: {counted(settings.patience, 'validation')} without a lower loss")
    if best.step < len(result.losses):
        when = f"after step {best.step}" if best.step else "before the training"
        notes.append(f"the validation loss was lowest {when}; the result has the weights of then")
    return notes


def shared_settings(settings: RecoverSettings) -> dict[str, Any]:
    """The settings that all strategies share, as JSON values."""
    of_strategy = {name for name in RecoverSettings.model_fields if option_of(RecoverSettings, name).sets}
    return settings.model_dump(mode="json", exclude=_NOT_SHARED | of_strategy)


def merge_adapters(model: Any) -> Any:
    """The base model of a peft model, with the adapters added to its weights; any other model unchanged."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def _identity(
    weights: Weights, data: TrainingData, strategy: RecoveryStrategy, settings: RecoverSettings
) -> dict[str, Any]:
    """All that the result depends on, as JSON values."""
    validation = [] if data.validation is None else data.validation.rows
    return {
        "strategy": strategy.name,
        "strategy settings": strategy.record(),
        "settings": shared_settings(settings),
        "examples": _digest(data.rows.rows),
        "validation examples": _digest(validation),
        "processes": Ranks.current().count,
        "model": _weights_fingerprint(weights),
    }


def _digest(rows: list[dict[str, list[int]]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _weights_fingerprint(weights: Weights) -> str:
    """SHA-256 over name, shape, dtype and about 64 evenly spaced weights of every parameter, which is enough to
    distinguish models."""
    names: dict[int | None, list[str]] = {}
    for name, _ in weights.model.named_parameters():
        names.setdefault(weights.number(name), []).append(name)
    lines: dict[str, str] = {}
    for part, found in names.items():
        with weights.part(part):
            lines |= {name: _fingerprint_line(name, weights.model.get_parameter(name)) for name in found}
    digest = hashlib.sha256()
    for name, _ in weights.model.named_parameters():
        digest.update(lines[name].encode())
    return digest.hexdigest()


def _fingerprint_line(name: str, parameter: torch.Tensor) -> str:
    flat = parameter.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // 64)].float().cpu().tolist()
    return f"{name} {tuple(parameter.shape)} {parameter.dtype} {sample}\n"


def check_work_dir(work_dir: Path) -> None:
    """Raise `OutputError` for a directory that is neither new, nor empty, nor that of a recovery job."""
    try:
        ours = any((work_dir / name).is_file() for name in (_IDENTITY, WRITTEN_FILE))
        if work_dir.exists() and not ours and holds_files(work_dir):
            raise OutputError(f"{work_dir} is not empty and holds no recovery job; choose another directory")
    except OSError as error:
        raise OutputError(f"{work_dir} cannot be used: {error.strerror}") from None


def _claim(work_dir: Path, identity: dict[str, Any]) -> None:
    """Create ``work_dir`` for this job. Raises `OutputError` if it exists and belongs to another one."""
    file = work_dir / _IDENTITY
    try:
        if file.is_file():
            found = dict(json.loads(file.read_text()))
            changed = [key for key, value in identity.items() if found.get(key) != value]
            if changed:
                raise OutputError(
                    f"{work_dir} holds the state of another recovery job ({', '.join(changed)} differ); "
                    "delete it or choose another directory"
                )
            return
        check_work_dir(work_dir)
        work_dir.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(identity, indent=2) + "\n")
    except (ValueError, TypeError):
        raise OutputError(f"{file} is damaged; delete {work_dir} and start again") from None
    except OSError as error:
        raise OutputError(f"{work_dir} cannot be used: {error.strerror}") from None
