"""Benchmark tasks of lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import filter as matching
from functools import cache
from importlib import metadata
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, MissingExtraError, UnknownNameError, first_line
from ..loggers import only_errors
from ..progress import QUIET, Progress
from .task_bars import bars_to

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASK_GROUPS = {
    "paper": ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
}
"""Names of task lists in addition to the groups of lm-eval; ``paper``: the zero-shot tasks of LLM-Pruner, table 1."""


class TaskScores(dict[str, dict[str, float]]):
    """Task → metric → value, with ``<metric>_stderr`` for metrics that have a standard error.

    ``rows``: task → `RowScores`, for tasks with metrics that are means over their rows. Groups have none; their tasks
    do.
    """

    def __init__(self, values: Mapping[str, dict[str, float]], rows: Mapping[str, RowScores]) -> None:
        super().__init__(values)
        self.rows = rows


@dataclass(frozen=True)
class RowScores:
    """The scores of the rows of one task. ``sha256``: checksum of the rows in their order. ``scores``: metric → one
    number a row, in that order; their mean is the value of the metric. Whole numbers are int."""

    sha256: str
    scores: Mapping[str, list[float]]


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data, for any number of models. ``tasks``: name → lm-eval's task and group objects."""

    tasks: Mapping[str, tuple[Any, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tasks)

    def only(self, name: str) -> LoadedTasks:
        """One of them."""
        return LoadedTasks({name: self.tasks[name]})

    def rows(self, name: str, limit: int | None) -> int:
        """Number of rows that are evaluated; a group's are those of all its tasks."""
        return sum(len(task.eval_docs) if limit is None else min(limit, len(task.eval_docs)) for task in self.of(name))

    def identity(self, name: str, limit: int | None, num_fewshot: int | None = None) -> dict[str, Any]:
        """JSON values that change with anything that the scores depend on besides model and settings. ``num_fewshot``:
        as in `evaluate_tasks`."""
        digest = hashlib.sha256()
        for task in self.of(name):
            digest.update(json.dumps(task.dump_config(), sort_keys=True, default=_described).encode())
            digest.update(json.dumps(_docs(task, limit), sort_keys=True, default=str).encode())
            if task.config.num_fewshot if num_fewshot is None else num_fewshot:
                # Examples are drawn from these rows, which may be of another split.
                with only_errors("lm_eval"):
                    shown = list(task.fewshot_docs())
                digest.update(json.dumps(shown, sort_keys=True, default=str).encode())
        return {"name": name, "sha256": digest.hexdigest(), "lm-eval": metadata.version("lm-eval")}

    def text(self, name: str, limit: int | None) -> str:
        """All text of the rows that are evaluated."""
        return "\n".join(text for task in self.of(name) for doc in _docs(task, limit) for text in _strings(doc))

    def of(self, name: str) -> Iterator[Any]:
        """lm-eval's task objects of one name; for a group those of all its tasks."""
        for one in self.tasks[name]:
            yield from one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one]


def _docs(task: Any, limit: int | None) -> list[Any]:
    return list(islice(task.eval_docs, limit))


def _described(value: Any) -> str:
    """A function of a task's configuration by its source: its address differs between processes."""
    if not callable(value):
        return str(value)
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return str(getattr(value, "__qualname__", type(value).__name__))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(one)


def load_tasks(names: Sequence[str], *, include_path: Path | None = None) -> LoadedTasks:
    """Find tasks and load their data, before any model is loaded.

    ``names``: lm-eval's tasks, groups and patterns (``mmlu_*``), or names of `TASK_GROUPS`. ``include_path``: folder of
    more task files, which are preferred to others of the same name.

    Raises `UnknownNameError` for a task that does not exist, `DataError` for one whose data cannot be loaded.
    """
    # Notices of lm-eval, and bars of datasets, have no common setting, but all go to standard error.
    with only_errors("lm_eval"), contextlib.redirect_stderr(io.StringIO()):
        manager = _manager(names, include_path)
        return LoadedTasks({name: tuple(_load(manager, name)) for name in expand(names, manager.all_tasks)})


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str] | LoadedTasks,
    *,
    limit: int | None = None,
    include_path: Path | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    seed: int = 0,
    progress: Progress = QUIET,
) -> TaskScores:
    """Task → metric → value, with ``<metric>_stderr`` for metrics that have a standard error: the numbers of the
    command ``lm_eval --model hf`` with the same batch size. Also the scores of single rows; see `TaskScores`.

    ``tasks``: names for `load_tasks`, or its result. ``limit``: number of rows per task. ``num_fewshot``: by default
    the task's own number. ``seed``: added to lm-eval's own seeds.
    """
    if not isinstance(tasks, LoadedTasks):
        tasks = load_tasks(tasks, include_path=include_path)
    with only_errors("lm_eval"), progress.bar("lm-eval") as at, bars_to(lambda share: at(share, "lm-eval")), _no_git():
        import lm_eval
        from lm_eval.evaluator import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
        from lm_eval.models.huggingface import HFLM

        from ..models.vocabulary import with_padding

        was_training = model.training
        # lm-eval gives the tokenizer a token for padding where it has none.
        padded = tokenizer if tokenizer.pad_token_id is None else with_padding(tokenizer, model)
        wrapped = HFLM(
            pretrained=model.eval(), tokenizer=copy.deepcopy(padded), batch_size=batch_size, backend="causal"
        )
        try:
            found = lm_eval.simple_evaluate(
                model=wrapped,
                tasks=[task for objects in tasks.tasks.values() for task in objects],
                num_fewshot=num_fewshot,
                limit=limit,
                log_samples=True,
                random_seed=DEFAULT_RANDOM_SEED + seed,
                numpy_random_seed=DEFAULT_OTHER_SEED + seed,
                torch_random_seed=DEFAULT_OTHER_SEED + seed,
                fewshot_random_seed=DEFAULT_OTHER_SEED + seed,
                # Not used for loaded tasks, but avoids building the index again.
                task_manager=_task_manager()(include_defaults=False),
            )
        finally:
            model.train(was_training)
    values = {name: _metrics(of_task) for name, of_task in found["results"].items()}
    averaged = {task.task_name: _averaged(task) for name in tasks.names for task in tasks.of(name)}
    rows = {name: _row_scores(found["samples"][name], is_mean) for name, is_mean in averaged.items()}
    return TaskScores(values, {name: one for name, one in rows.items() if one is not None})


def expand(tasks: Sequence[str], known: Sequence[str]) -> list[str]:
    """``tasks`` with names of `TASK_GROUPS` and patterns expanded, each name once. Raises `UnknownNameError`, and
    `DataError` when there is none."""
    names: dict[str, None] = {}
    for task in (member for name in tasks for member in TASK_GROUPS.get(name, (name,))):
        matches = matching(known, task)
        if not matches:
            raise UnknownTaskError(task, known)
        names.update(dict.fromkeys(matches))
    if not names:
        raise DataError("no task was named")
    return list(names)


class UnknownTaskError(UnknownNameError):
    """As its base class, but the message does not list the thousands of known tasks."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__("task", name, [*known, *TASK_GROUPS])
        message = str(self).partition(" Known: ")[0]
        self.args = (f"{message.rstrip(';.')}; 'lm_eval ls tasks' lists all, --include-path adds your own",)


def _task_manager() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingExtraError("lm-eval", "evaluate") from None
    return TaskManager


@cache
def builtin_manager() -> Any:
    """lm-eval's index of its own tasks, cached, as reading their ten thousand files takes seconds."""
    return _task_manager()()


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    if include_path is None:
        return builtin_manager()
    if not include_path.is_dir():
        raise DataError(f"--include-path {include_path}: no such directory")
    own = _task_manager()(include_path=str(include_path), include_defaults=False)
    if {member for name in names for member in TASK_GROUPS.get(name, (name,))} <= set(own.all_subtasks):
        return own
    return _task_manager()(include_path=str(include_path))


def _load(manager: Any, name: str) -> list[Any]:
    """The task objects of one name, with their data loaded."""
    # The libraries that load data raise errors of many types.
    try:
        loaded = manager.load([name])
    except Exception as error:
        raise DataError(
            f"the data of task '{name}' cannot be loaded: {first_line(error)}; without the hub, give task files "
            "that read local data with --include-path"
        ) from error
    return [*loaded.get("groups", {}).values()] or [*loaded["tasks"].values()]


@contextlib.contextmanager
def _no_git() -> Iterator[None]:
    """While active, lm-eval does not ask git for the commit of the working directory: it has nothing to do with lm-eval
    or the model, and outside of a repository git prints an error."""
    from lm_eval import evaluator

    asked, evaluator.get_git_commit_hash = evaluator.get_git_commit_hash, lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asked


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    metrics = {}
    for key, value in values.items():
        name, _, variant = key.partition(",")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and variant:
            metrics[_named(name, variant)] = float(value)
    return metrics


def _named(metric: str, variant: str) -> str:
    """``variant``: the filter of the answers; "none" for tasks without."""
    return metric if variant == "none" else f"{metric} ({variant})"


def _averaged(task: Any) -> Callable[[str], bool]:
    """Whether the value of a metric is the mean of its rows; it is also that of a metric for which the task names no
    aggregation."""
    from lm_eval.api.metrics import mean

    aggregations = task.aggregation()
    return lambda metric: aggregations.get(metric, mean) is mean


def _row_scores(samples: Sequence[Mapping[str, Any]], is_mean: Callable[[str], bool]) -> RowScores | None:
    """``samples``: of one task, as lm-eval logs them: one for each filter and row, the rows of one filter after those
    of another. None where no metric has a score for every row."""
    by_filter: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for sample in samples:
        by_filter[sample["filter"]].append(sample)
    scores = {}
    for variant, rows in by_filter.items():
        for metric in dict.fromkeys(metric for row in rows for metric in row["metrics"]):
            # A row may lack a metric, whose mean is then that of other rows.
            found = [_number(row[metric]) if metric in row["metrics"] else None for row in rows]
            numbers = [number for number in found if number is not None]
            if is_mean(metric) and len(numbers) == len(rows):
                scores[_named(metric, variant)] = numbers
    if not scores:
        return None
    # Every filter sees all rows, in the same order.
    first = next(iter(by_filter.values()))
    return RowScores(hashlib.sha256("".join(row["doc_hash"] for row in first).encode()).hexdigest(), scores)


def _number(value: Any) -> float | None:
    """``value`` as int where it is whole, else as float; None for what is no finite number."""
    # NumPy's bool is no number of Python's.
    if not isinstance(value, Real) and type(value).__name__ not in ("bool", "bool_"):
        return None
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() else number
