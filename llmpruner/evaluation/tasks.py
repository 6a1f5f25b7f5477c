"""Benchmark tasks of lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import filter as matching
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, MissingExtraError, UnknownNameError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASK_GROUPS = {
    "paper": ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
}
"""Names of task lists in addition to the groups of lm-eval; ``paper``: the zero-shot tasks of LLM-Pruner, table 1."""


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data, for any number of models. ``tasks``: lm-eval's task and group objects."""

    names: tuple[str, ...]
    tasks: tuple[Any, ...]


def load_tasks(names: Sequence[str], *, include_path: Path | None = None, progress: bool = False) -> LoadedTasks:
    """Find tasks and load their data, before any model is loaded.

    ``names``: lm-eval's tasks, groups and patterns (``mmlu_*``), or names of `TASK_GROUPS`. ``include_path``: folder of
    more task files, which are preferred to others of the same name. ``progress``: whether the progress bars and notices
    of lm-eval are shown on standard error.

    Raises `UnknownNameError` for a task that does not exist, `DataError` for one whose data cannot be loaded.
    """
    with _quiet(progress):
        manager = _manager(names, include_path)
        expanded = expand(names, manager.all_tasks)
        return LoadedTasks(tuple(expanded), tuple(task for name in expanded for task in _load(manager, name)))


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str] | LoadedTasks,
    *,
    limit: int | None = None,
    include_path: Path | None = None,
    batch_size: int = 8,
    num_fewshot: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Task → metric → value, with ``<metric>_stderr`` for metrics that have a standard error.

    ``tasks``: names for `load_tasks`, or its result. ``limit``: number of rows per task. ``num_fewshot``: for tasks
    that do not define their own number.
    """
    if not isinstance(tasks, LoadedTasks):
        tasks = load_tasks(tasks, include_path=include_path, progress=progress)
    with _quiet(progress):
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        was_training = model.training
        wrapped = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        try:
            found = lm_eval.simple_evaluate(
                model=wrapped,
                tasks=list(tasks.tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=1000,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                # Not used for loaded tasks, but avoids building the index again.
                task_manager=_task_manager()(include_defaults=False),
            )
        finally:
            model.train(was_training)
    return {name: _metrics(values) for name, values in found["results"].items()}


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


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    metrics = {}
    for key, value in values.items():
        name, _, variant = key.partition(",")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and variant:
            metrics[name if variant == "none" else f"{name} ({variant})"] = float(value)
    return metrics


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    # Bars and notices of lm-eval and datasets have no common setting, but all go to standard error.
    silence = contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO())
    try:
        with silence:
            yield
    finally:
        logger.setLevel(level)
